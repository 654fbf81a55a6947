"""One training under a policy, and all that later questions may need of it."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

from tasks.sources import Batch
from tasks.training import Loop, prepare, tail, train
from torch import Tensor

from harness.policies import named
from harness.policy import Make, StartAgain
from harness.run import Run


class Timed:
    """A policy with its wall time."""

    def __init__(self, make: Make, loop: Loop) -> None:
        start = time.perf_counter()
        self.policy = make(loop)
        self._seconds = time.perf_counter() - start

    @property
    def seconds(self) -> float:
        return self._seconds - self.policy.uncharged

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        start = time.perf_counter()
        self.policy(step, batch, loss)
        self._seconds += time.perf_counter() - start

    def close(self) -> None:
        start = time.perf_counter()
        self.policy.close()
        self._seconds += time.perf_counter() - start


def execute(run: Run, policy: str) -> dict[str, Any]:
    """Train once and return the story as plain data.

    Who starts again does so with the same batches; the story is that of the last attempt.
    """
    make: Make | None = named(policy).make
    while make is not None:
        loop = prepare(run.task, run.recipe)
        watch = Timed(make, loop)
        make = None
        try:
            trace = train(loop, watch)
            watch.close()
        except StartAgain as again:
            make = again.make
    end = tail(trace, run.task.items(run.recipe.batch))
    finite = math.isfinite(trace.losses[-1])
    return {
        "losses": trace.losses,
        "grad_norms": trace.grad_norms,
        "rates": trace.rates,
        "taken": trace.taken,
        "scores": trace.scores,
        "seconds": {
            "bare": trace.seconds,
            "policy": watch.seconds,
            "grad_norms": trace.norm_seconds,
        },
        "tail": end if math.isfinite(end) else None,
        "evaluation": asdict(run.task.evaluate(loop.model)) if finite else None,
        **watch.policy.facts(),
    }
