"""The runs of the benchmark: the same list every time, in two halves that share nothing.

The halves differ in architecture and in seed. Levels and thresholds may be chosen on "tune";
"held" is for reporting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tasks import TASKS, Task
from tasks.rates import Rates, rates
from tasks.training import Recipe

Half = Literal["tune", "held"]
Combination = tuple[str, str, int | None]  # task, optimizer, batch size

_HALVES: tuple[Half, ...] = ("tune", "held")
SEEDS: dict[Half, tuple[int, int]] = {"tune": (0, 1), "held": (2, 3)}
COMBINATIONS: dict[Half, tuple[Combination, ...]] = {
    "tune": (
        ("mlp-digits", "sgd", 64),
        ("mlp-digits", "sgd", 16),
        ("mlp-digits", "sgd", 4),
        ("mlp-digits", "sgd", None),
        ("mlp-digits", "adam", 64),
        ("mlp-digits", "adam", None),
        ("mlp-digits", "adamw", 16),
        ("encoder-digits", "sgd", 64),
        ("encoder-digits", "sgd", 16),
        ("encoder-digits", "adam", 16),
        ("encoder-digits", "adamw", 64),
        ("conv-mnist", "sgd", 64),
        ("conv-mnist", "sgd", 16),
        ("conv-mnist", "adamw", 64),
        ("lstm-kjv", "sgd", 16),
        ("lstm-kjv", "adamw", 16),
    ),
    "held": (
        ("mlp-mnist", "sgd", 64),
        ("mlp-mnist", "sgd", 16),
        ("mlp-mnist", "sgd", 4),
        ("mlp-mnist", "sgd", None),
        ("mlp-mnist", "adam", 64),
        ("mlp-mnist", "adam", None),
        ("mlp-mnist", "adamw", 16),
        ("resnet-mnist", "sgd", 64),
        ("resnet-mnist", "sgd", 16),
        ("resnet-mnist", "adamw", 64),
        ("gpt-kjv", "sgd", 16),
        ("gpt-kjv", "adamw", 16),
        ("gpt-kjv", "adam", 4),
        ("minilm-verses", "adamw", 16),
    ),
}
QUICK: dict[Half, tuple[Combination, ...]] = {
    "tune": (("mlp-digits", "sgd", 64), ("mlp-digits", "adam", 64)),
    "held": (("mlp-mnist", "sgd", 64), ("mlp-mnist", "adam", 64)),
}
QUICK_SHAPES = (
    "constant-1tuned",
    "ramp-0.5tuned",
    "ramp-2breaks",
    "ramp-8breaks",
    "constant-1.5breaks",
    "jump-0.1tuned-jump4",
    "jump-1tuned-jump30",
)
COSTLY: frozenset[Combination] = frozenset(
    {
        ("mlp-digits", "adam", None),
        ("mlp-mnist", "sgd", None),
        ("mlp-mnist", "adam", None),
        ("resnet-mnist", "sgd", 16),
        ("resnet-mnist", "adamw", 64),
        ("gpt-kjv", "sgd", 16),
        ("gpt-kjv", "adam", 4),
        ("minilm-verses", "adamw", 16),
    }
)
EDGE: dict[Half, str] = {"tune": "gd-digits", "held": "gd-mnist"}


@dataclass(frozen=True)
class Shape:
    """A way to choose the rate: a multiple of the tuned or the breaking one, and its course."""

    schedule: str
    unit: Literal["tuned", "breaks", "middle"]
    multiple: float
    jump: float = 1.0

    @property
    def label(self) -> str:
        jump = f"-jump{self.jump:g}" if self.jump != 1 else ""
        return f"{self.schedule}-{self.multiple:g}{self.unit}{jump}"

    def rate(self, known: Rates) -> float:
        if self.unit == "middle":
            return self.multiple * (known.tuned * known.breaks) ** 0.5
        return self.multiple * (known.tuned if self.unit == "tuned" else known.breaks)


# Healthy and failing ones in either list: the first is for the first seed of a half, the second
# for the second. Costly combinations make do with the first seven of each.
FIRST = (
    Shape("constant", "tuned", 1),
    Shape("ramp", "tuned", 0.5),
    Shape("ramp", "breaks", 2),
    Shape("constant", "tuned", 30),
    Shape("constant", "breaks", 1.5),
    Shape("jump", "tuned", 0.1, jump=4),
    Shape("jump", "tuned", 0.3, jump=30),
    Shape("cosine", "tuned", 1),
    Shape("ramp", "breaks", 8),
    Shape("constant", "tuned", 4),
    Shape("jump", "tuned", 1, jump=4),
)
SECOND = (
    Shape("ramp", "tuned", 1),
    Shape("warmup", "tuned", 1),
    Shape("ramp", "breaks", 4),
    Shape("warmup", "breaks", 4),
    Shape("constant", "tuned", 10),
    Shape("constant", "tuned", 100),
    Shape("jump", "tuned", 1, jump=30),
    Shape("constant", "tuned", 0.3),
    Shape("onecycle", "tuned", 1),
    Shape("ramp", "middle", 1),
    Shape("jump", "tuned", 0.3, jump=4),
    Shape("jump", "tuned", 1, jump=10),
)
_LEAN = 7
ON_EDGE = tuple(Shape("constant", "tuned", m) for m in (0.35, 0.5, 0.7, 1))


@dataclass(frozen=True)
class Run:
    """One training of the benchmark."""

    half: Half
    task_name: str
    shape: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """What files of this run are called."""
        batch = "full" if self.recipe.batch is None else self.recipe.batch
        return f"{self.task_name}-{self.recipe.optimizer}-b{batch}-{self.shape}-s{self.recipe.seed}"

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    @property
    def rates(self) -> Rates:
        return rates(self.task, self.recipe.optimizer, self.recipe.batch)

    @property
    def scenario(self) -> str:
        """What is tried: "start" (too large from step 0), "ramp", "jump", "edge" or "steady"."""
        recipe = self.recipe
        if recipe.optimizer == "gd":
            return "edge"
        if recipe.schedule == "constant" and recipe.rate > 2 * self.rates.tuned:
            return "start"
        named = {"ramp": "ramp", "warmup": "ramp", "jump": "jump"}
        return named.get(recipe.schedule, "steady")

    @property
    def multiple(self) -> float:
        """The largest rate of the run in units of the tuned one."""
        return self.recipe.rate * max(self.recipe.jump, 1.0) / self.rates.tuned

    @property
    def adaptive(self) -> bool:
        """Whether the optimizer is of the Adam family."""
        return self.recipe.optimizer.startswith("adam")


def grid() -> list[Run]:
    """Return all runs."""
    return [
        run
        for half in _HALVES
        for run in (*_ramps_and_jumps(half, COMBINATIONS[half]), *_edges(half))
    ]


def quick() -> list[Run]:
    """Return a few cheap runs of either half: for trying the benchmark, not for its figures."""
    cheap = [run for half in _HALVES for run in _ramps_and_jumps(half, QUICK[half])]
    edges = [next(_edges(half)) for half in _HALVES]
    return [run for run in cheap if run.shape in QUICK_SHAPES] + edges


def _ramps_and_jumps(half: Half, combinations: Sequence[Combination]) -> Iterator[Run]:
    for combination in combinations:
        for seed, shapes in zip(SEEDS[half], (FIRST, SECOND), strict=True):
            for shape in shapes[:_LEAN] if combination in COSTLY else shapes:
                yield _run(half, combination, shape, seed)


def _edges(half: Half) -> Iterator[Run]:
    for seed in SEEDS[half]:
        for shape in ON_EDGE:
            yield _run(half, (EDGE[half], "gd", None), shape, seed)


def _run(half: Half, combination: Combination, shape: Shape, seed: int) -> Run:
    name, optimizer, batch = combination
    task = TASKS[name]
    rate = shape.rate(rates(task, optimizer, batch))
    recipe = Recipe(optimizer, rate, batch, seed, task.steps, shape.schedule, shape.jump)
    return Run(half, name, shape.label, recipe)
