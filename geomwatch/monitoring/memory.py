"""What lives across the probes of a run: difficulty, held values."""

from __future__ import annotations

import math
from dataclasses import replace

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Settled
from geomwatch.records import Estimate


class Difficulty(Resumable):
    """Optimization difficulty so far, O = sum_t lr_t ||g_t||^2 lambda_max(H_t).

    The paper's cumulative training sensitivity, in units of loss / lr. lambda_max is held between
    probes and the gradient is the mini-batch's (as stepped with, biased up by its noise), so this
    is an approximation and has no error bar. 0 HVPs.
    """

    _total: Kept[float]
    _missing: Kept[bool]
    _step: Kept[int]

    def __init__(self) -> None:
        self._total = 0.0
        self._missing = False  # lambda_max, at the last step
        self._step = -1  # of the last one that was added

    def update(self, lr: float, step: Settled, lambda_max: float | None) -> None:
        """Add a step whose gradient norm is known, for all since the last one that was taken."""
        self._missing = lambda_max is None
        norm, since = step.grad_norm, max(step.step - self._step, 1)
        if lambda_max is None or norm is None or not step.stepped or not math.isfinite(norm):
            return
        self._step = step.step
        self._total += since * lr * norm**2 * abs(lambda_max)

    def estimate(self) -> Estimate:
        """Return the sum so far; none where lambda_max was never known."""
        if self._missing:
            return Estimate(None, status="withheld", reason="lambda_max is not known")
        reason = "lambda_max and gradient norm held between looks, mini-batch gradient norm"
        return Estimate(self._total, status="ok", reason=reason)


class Held(Resumable):
    """The last good estimate of each quantity, for the probes that do not measure it."""

    _last: Kept[dict[str, tuple[int, Estimate]]]

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, Estimate]] = {}

    def merge(self, step: int, fresh: dict[str, Estimate]) -> dict[str, Estimate]:
        """Return the fresh estimates and, marked with their age, the held ones."""
        for name, estimate in fresh.items():
            if estimate.value is not None:
                self._last[name] = (step, estimate)
        held = {
            name: replace(estimate, status="held", hvps=0, age=step - measured)
            for name, (measured, estimate) in self._last.items()
            if name not in fresh
        }
        return fresh | held

    def value(self, name: str) -> float | None:
        """Return the last good value of a quantity."""
        return self._last[name][1].value if name in self._last else None
