"""The runs of each question: the same list every time, in sets that share nothing.

The sets differ in tasks and in seeds. Levels, thresholds and settings may be chosen on
"development"; "validation" is for reporting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks import TASKS
from tasks.rates import rates
from tasks.sets import Part

from harness.run import Run, Setting, Shape

SEEDS: dict[Part, tuple[int, ...]] = {"development": (0, 1), "validation": (2, 3, 4)}


def _settings(name: str, *trained: tuple[str, int | None], costly: bool = False) -> list[Setting]:
    return [Setting(name, *how, TASKS[name].steps, costly) for how in trained]


# Which failures are announced?

FORECAST = (
    *_settings("mlp-digits", ("sgd", 64), ("sgd", 16), ("sgd", 4), ("sgd", None)),
    *_settings("mlp-digits", ("adam", 64), ("adamw", 16)),
    *_settings("mlp-digits", ("adam", None), costly=True),
    *_settings("encoder-digits", ("sgd", 64), ("sgd", 16), ("adam", 16), ("adamw", 64)),
    *_settings("conv-mnist", ("sgd", 64), ("sgd", 16), ("adamw", 64)),
    *_settings("lstm-kjv", ("sgd", 16), ("adamw", 16)),
    *_settings("mlp-mnist", ("sgd", 64), ("sgd", 16), ("sgd", 4), ("adam", 64), ("adamw", 16)),
    *_settings("mlp-mnist", ("sgd", None), ("adam", None), costly=True),
    *_settings("resnet-mnist", ("sgd", 64)),
    *_settings("resnet-mnist", ("sgd", 16), ("adamw", 64), costly=True),
    *_settings("gpt-kjv", ("adamw", 16)),
    *_settings("gpt-kjv", ("sgd", 16), ("adam", 4), costly=True),
    *_settings("minilm-verses", ("adamw", 16), costly=True),
)
# Gradient descent at the edge of stability: the same data at each step.
FULL_BATCH = (*_settings("gd-digits", ("gd", None)), *_settings("gd-mnist", ("gd", None)))
# Healthy and failing ones in either list: the first is for the first seed of a set, the second
# for the second. Costly settings make do with the first seven of each.
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
_COSTLY = 7
ON_EDGE = tuple(Shape("constant", "tuned", m) for m in (0.35, 0.5, 0.7, 1))
_CHEAP = (
    ("mlp-digits", "sgd"),
    ("mlp-digits", "adam"),
    ("mlp-mnist", "sgd"),
    ("mlp-mnist", "adam"),
)
_CHEAP_SHAPES = (
    "constant-1tuned",
    "ramp-0.5tuned",
    "ramp-2breaks",
    "ramp-8breaks",
    "constant-1.5breaks",
    "jump-0.1tuned-jump4",
    "jump-1tuned-jump30",
)


def forecast() -> list[Run]:
    """Return all runs of the question which failures are announced."""
    return [*_announced(FORECAST), *_edges(FULL_BATCH)]


def forecast_quick() -> list[Run]:
    """Return a few cheap runs of either set: for trying the benchmark, not for its figures."""
    cheap = [s for s in FORECAST if (s.task_name, s.optimizer) in _CHEAP and s.batch == 64]
    edges = [next(_edges([setting])) for setting in FULL_BATCH]
    return [run for run in _announced(cheap) if run.shape in _CHEAP_SHAPES] + edges


def _announced(settings: Sequence[Setting]) -> Iterator[Run]:
    for setting in settings:
        for seed, shapes in zip(SEEDS[setting.part], (FIRST, SECOND), strict=False):
            for shape in shapes[:_COSTLY] if setting.costly else shapes:
                yield setting.run(shape, seed)


def _edges(settings: Sequence[Setting]) -> Iterator[Run]:
    for setting in settings:
        for seed in SEEDS[setting.part][:2]:
            for shape in ON_EDGE:
                yield setting.run(shape, seed)


# Do the warnings hold on kinds of runs that they were not made for?

KINDS = tuple(
    setting
    for name, batch in (
        ("regression-table", 32),
        ("vae-digits", 64),
        ("contrastive-digits", 64),
        ("reinforce-grid", 32),
        ("deepsets-max", 32),
        ("pinn-poisson", 64),
        ("vit-digits", 32),
        ("lstm-topics", 16),
        ("graphs-triangles", 32),
        ("moe-digits", 32),
    )
    for setting in _settings(name, ("sgd", batch), ("adam", batch))
)
KINDS_FIRST = (
    Shape("constant", "tuned", 1),
    Shape("onecycle", "tuned", 1),
    Shape("constant", "middle", 1),
    Shape("constant", "tuned", 10),
    Shape("ramp", "breaks", 4, hidden=True),
)
KINDS_SECOND = (
    Shape("cosine", "tuned", 1),
    Shape("constant", "tuned", 0.3),
    Shape("constant", "tuned", 30),
    Shape("ramp", "breaks", 2, hidden=True),
    Shape("ramp", "breaks", 4),
)


def kinds(part: Part) -> list[Run]:
    """Return the runs of the many kinds of a set: ten a setting, healthy and failing ones."""
    return [
        setting.run(shape, seed)
        for setting in KINDS
        if setting.part == part
        for seed, shapes in zip(SEEDS[part], (KINDS_FIRST, KINDS_SECOND), strict=False)
        for shape in shapes
    ]


# Which runs does a controller rescue?

RESCUE = (
    Setting("mlp-digits", "sgd", 64, 600),
    Setting("mlp-digits", "adamw", 16, 600),
    Setting("conv-mnist", "sgd", 64, 300),
    Setting("conv-mnist", "adamw", 64, 300),
    Setting("encoder-digits", "sgd", 64, 400),
    Setting("encoder-digits", "adamw", 64, 400),
    Setting("mlp-mnist", "sgd", 64, 600),
    Setting("mlp-mnist", "adamw", 16, 600),
    Setting("resnet-mnist", "sgd", 64, 400, costly=True),
    Setting("resnet-mnist", "adamw", 64, 400, costly=True),
    Setting("gpt-kjv", "sgd", 16, 600, costly=True),
    Setting("gpt-kjv", "adamw", 16, 600, costly=True),
    Setting("minilm-verses", "adamw", 16, 100, costly=True),
)
LONG = (  # what control costs over a run of some length
    Setting("resnet-mnist", "sgd", 64, 1000, costly=True),
    Setting("encoder-digits", "adamw", 64, 1000),
)
NOISY = (  # batches too small for rates that suit batches of 64, and that batch
    Setting("mlp-digits", "sgd", 16, 1200),
    Setting("mlp-digits", "sgd", 64, 1200),
    Setting("mlp-mnist", "sgd", 16, 1200),
    Setting("mlp-mnist", "sgd", 64, 1200),
)
EDGES = (Setting("gd-digits", "gd", None, 2000), Setting("gd-mnist", "gd", None, 2000))
MULTIPLES = (0.25, 1.0, 4.0, 8.0, 16.0, 30.0)
SCHEDULES = ("constant", "cosine", "onecycle", "warmup")
DECISIVE = (("constant", "cosine"), (1.0, 8.0, 30.0))  # the part of the grid that decides
CALIBRATION = 1000  # the seed that warm-ups are tuned on


def rescue(settings: Sequence[Setting], *, few: bool = False, seeds: int = 3) -> list[Run]:
    """Return the runs of some settings, before it is said what controls them."""
    return [run for setting in settings for run in _multiplied(setting, few, seeds)]


def multiplied(setting: Setting, schedule: str, multiple: float, seed: int) -> Run:
    """Return a run whose schedule is a multiple of the tuned rate as a whole."""
    return setting.run(Shape(schedule, "tuned", multiple), seed)


def noisy() -> list[Run]:
    """Return runs at once and twice the rate tuned for batches of 64, with batches of 16 too."""
    found = []
    for setting in NOISY:
        tuned = rates(setting.task, setting.optimizer, 64).tuned
        for times in (1.0, 2.0):
            multiple = times * tuned / setting.rates.tuned
            seeds = SEEDS[setting.part][:2]
            found += [multiplied(setting, "constant", multiple, seed) for seed in seeds]
    return found


def _multiplied(setting: Setting, few: bool, seeds: int) -> Iterator[Run]:
    schedules, multiples = DECISIVE if few or setting.costly else (SCHEDULES, MULTIPLES)
    for schedule in schedules:
        for multiple in multiples:
            for seed in SEEDS[setting.part][:seeds]:
                yield multiplied(setting, schedule, multiple, seed)
