"""One training under a policy, and what the report needs of it."""

from __future__ import annotations

import math
import time
from typing import Any

from tasks.training import Loop, Recipe, Trace, prepare, tail, train
from torch.optim.lr_scheduler import LambdaLR

from rescuing.grid import Run
from rescuing.growing import Batches
from rescuing.policies import make

_WARM_UP = 0.1  # of the run
BATCHES = ("batches", "batches-cap")
TUNED = "tuned"  # the policy: a warm-up in front of the schedule, and a rate chosen with it


def execute(run: Run, policy: str) -> dict[str, Any]:
    """Train once and return the outcome as plain data."""
    setting = run.setting
    recipe = Recipe(
        setting.optimizer, run.rate, setting.batch, run.seed, setting.steps, run.schedule
    )
    loop = _prepare(run, recipe, warm_up=policy == TUNED)
    watch = _Timed(_policy(policy, loop))
    trace = train(loop, recipe, watch)
    finite = math.isfinite(trace.losses[-1])
    return {
        "tail": _number(tail(trace, setting.task.items(setting.batch))),
        "accuracy": setting.task.evaluate(loop.model).accuracy if finite else 0.0,
        "losses": _thinned(trace),
        "steps": len(trace.losses),
        "seconds": {"bare": trace.seconds, "policy": watch.seconds},
        **watch.policy.facts(),
    }


def _policy(name: str, loop: Loop) -> Any:
    if name in BATCHES:
        return Batches(loop, cap=name == "batches-cap")
    return make("none" if name == TUNED else name, loop)


class _Timed:
    """A policy with its wall time."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.seconds = policy, 0.0

    def __call__(self, *step: Any) -> None:
        start = time.perf_counter()
        self.policy(*step)
        self.seconds += time.perf_counter() - start


def _prepare(run: Run, recipe: Recipe, *, warm_up: bool) -> Loop:
    if warm_up and run.schedule == "cosine":
        constant = Recipe(**{**vars(recipe), "schedule": "constant"})
        loop = prepare(run.setting.task, constant)
        loop.scheduler = LambdaLR(loop.optimizer, lambda t: _warm_cosine(t / recipe.steps))
        return loop
    if warm_up and run.schedule == "constant":
        recipe = Recipe(**{**vars(recipe), "schedule": "warmup"})
    return prepare(run.setting.task, recipe)  # the others warm up themselves


def _warm_cosine(done: float) -> float:
    if done < _WARM_UP:
        return 0.02 + 0.98 * done / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARM_UP) / (1 - _WARM_UP)))


def _thinned(trace: Trace) -> list[float | None]:
    every = max(1, len(trace.losses) // 100)
    return [_number(round(loss, 5)) for loss in trace.losses[::every]]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
