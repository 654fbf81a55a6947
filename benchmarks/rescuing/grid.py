"""The runs: tasks, schedules and multiples of the tuned rate, in two halves that share nothing.

Settings of the controllers may be chosen on "tune"; "held" has other architectures and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks import TASKS, Task
from tasks.rates import Rates, rates

Half = Literal["tune", "held"]

MULTIPLES = (0.25, 1.0, 4.0, 8.0, 16.0, 30.0)
SCHEDULES = ("constant", "cosine", "onecycle", "warmup")
SEEDS: dict[Half, tuple[int, ...]] = {"tune": (0, 1), "held": (2, 3, 4)}
CALIBRATION = 1000  # the seed that warm-ups are tuned on
FEW = (("constant", "cosine"), (1.0, 8.0, 30.0))  # the part of the grid that decides


@dataclass(frozen=True)
class Setting:
    """A task with its optimizer, its batch, and how long it is trained here."""

    half: Half
    task_name: str
    optimizer: str
    batch: int | None
    steps: int
    large: bool = False  # done on the part of the grid that decides

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def rates(self) -> Rates:
        return rates(self.task, self.optimizer, self.batch)

    @property
    def label(self) -> str:
        return f"{self.task_name} {self.optimizer}"


SETTINGS = (
    Setting("tune", "mlp-digits", "sgd", 64, 600),
    Setting("tune", "mlp-digits", "adamw", 16, 600),
    Setting("tune", "conv-mnist", "sgd", 64, 300),
    Setting("tune", "conv-mnist", "adamw", 64, 300),
    Setting("held", "mlp-mnist", "sgd", 64, 600),
    Setting("held", "mlp-mnist", "adamw", 16, 600),
    Setting("held", "encoder-digits", "sgd", 64, 400),
    Setting("held", "encoder-digits", "adamw", 64, 400),
    Setting("held", "resnet-mnist", "sgd", 64, 400, large=True),
    Setting("held", "resnet-mnist", "adamw", 64, 400, large=True),
    Setting("held", "gpt-kjv", "sgd", 16, 600, large=True),
    Setting("held", "gpt-kjv", "adamw", 16, 600, large=True),
    Setting("held", "minilm-verses", "adamw", 16, 100, large=True),
)
LONG = (  # what control costs over a run of some length
    Setting("held", "resnet-mnist", "sgd", 64, 1000, large=True),
    Setting("held", "encoder-digits", "adamw", 64, 1000),
)
# Batches too small for rates that suit batches of 64, and that batch.
NOISY = tuple(
    Setting(half, task, "sgd", batch, 1200)
    for half, task in (("tune", "mlp-digits"), ("held", "mlp-mnist"))
    for batch in (16, 64)
)
EDGES = (  # the same data at each step
    Setting("tune", "gd-digits", "gd", None, 2000),
    Setting("held", "gd-mnist", "gd", None, 2000),
)


@dataclass(frozen=True)
class Run:
    """One training, whatever controls it."""

    setting: Setting
    schedule: str
    multiple: float  # of the tuned rate
    seed: int

    @property
    def name(self) -> str:
        """What files of this run are called."""
        s = self.setting
        batch = "full" if s.batch is None else s.batch
        what = f"{s.task_name}-{s.optimizer}-b{batch}-t{s.steps}"
        return f"{what}-{self.schedule}-x{self.multiple:g}-s{self.seed}"

    @property
    def rate(self) -> float:
        return self.multiple * self.setting.rates.tuned


def noisy() -> list[Run]:
    """Return runs at once and twice the rate tuned for batches of 64, with batches of 16 too."""
    found = []
    for setting in NOISY:
        tuned = rates(setting.task, setting.optimizer, 64).tuned
        for times in (1.0, 2.0):
            multiple = times * tuned / setting.rates.tuned
            found += [Run(setting, "constant", multiple, seed) for seed in SEEDS[setting.half][:2]]
    return found


def runs(settings: Sequence[Setting], *, few: bool = False, seeds: int = 3) -> list[Run]:
    """Return the runs of some settings, before it is said what controls them."""
    return [run for setting in settings for run in _of(setting, few, seeds)]


def _of(setting: Setting, few: bool, seeds: int) -> Iterator[Run]:
    schedules, multiples = FEW if few or setting.large else (SCHEDULES, MULTIPLES)
    for schedule in schedules:
        for multiple in multiples:
            for seed in SEEDS[setting.half][:seeds]:
                yield Run(setting, schedule, multiple, seed)
