"""The loss has risen well above the lowest it has been."""

from __future__ import annotations

import math
from typing import Any

from geomwatch.records import Alert
from geomwatch.rules.observation import Latch, Observation, load_into, state_of

_SMOOTHING = 0.8
_NOISE_SMOOTHING = 0.98
_SHARE = 0.22  # of the first loss: 0.5 nats of the 2.3 that ten classes start from
_NOISE = 3.0  # standard deviations of a single loss


class LossRise:
    """Warns when the smoothed loss rises above its running minimum.

    rise = EMA(loss) - min EMA > max(0.22 |first loss|, 3 sd of a single loss about the EMA);
    critical when the EMA exceeds the first loss by the same amount. Curvature does not announce
    every failure (bad data, for one); this is the rule beside it.
    """

    name = "loss_rise"

    def __init__(self) -> None:
        self._first: float | None = None
        self._count = 0
        self._mean = 0.0  # EMA without bias correction
        self._variance = 0.0
        self._lowest = math.inf
        self._latch = Latch()

    def __call__(self, seen: Observation) -> Alert | None:
        """Judge the loss of the step before, or of a probe when the loop passes no losses."""
        loss, step = self._loss_of(seen)
        if loss is None or not math.isfinite(loss):
            return None
        smooth = self._update(loss)
        assert self._first is not None
        noise = _NOISE * math.sqrt(self._noise())
        limit = max(_SHARE * abs(self._first), noise)
        rise = smooth - self._lowest
        if rise <= limit:
            if rise < 0.5 * limit:
                self._latch.calm(step)
            return None
        severity = "critical" if smooth > self._first + limit else "warning"
        if not self._latch.admit(severity, step):
            return None
        message = (
            f"the loss has risen to {smooth:.4g} from its lowest {self._lowest:.4g} (smoothed; "
            f"limit {self._lowest + limit:.4g}, first loss {self._first:.4g}). Lower the learning "
            "rate or go back to a checkpoint from before the rise, and look at the last batches."
        )
        return Alert(
            self.name,
            "critical" if severity == "critical" else "warning",
            message,
            smooth,
            self._lowest + limit,
            step,
        )

    def _loss_of(self, seen: Observation) -> tuple[float | None, int]:
        if seen.settled is not None and seen.settled.loss is not None:
            return seen.settled.loss, seen.settled.step
        return seen.loss, seen.step

    def _update(self, loss: float) -> float:
        if self._first is None:
            self._first = loss
        before = self._mean / (1 - _SMOOTHING**self._count) if self._count else loss
        self._count += 1
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        deviation = (loss - before) ** 2
        if self._count > 10:  # a blow-up must not pass for noise: no single step counts for much
            deviation = min(deviation, 9 * self._noise())
        self._variance = _NOISE_SMOOTHING * self._variance + (1 - _NOISE_SMOOTHING) * deviation
        smooth = self._mean / (1 - _SMOOTHING**self._count)
        if self._count >= 5:  # a minimum over fewer is the luck of one batch
            self._lowest = min(self._lowest, smooth)
        return smooth if math.isfinite(self._lowest) else min(smooth, self._lowest)

    def _noise(self) -> float:
        """Return the variance of a single loss about the EMA."""
        return self._variance / (1 - _NOISE_SMOOTHING ** max(self._count, 1))

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages and the latch."""
        lowest = self._lowest if math.isfinite(self._lowest) else None
        own = {
            "first": self._first,
            "count": self._count,
            "mean": self._mean,
            "variance": self._variance,
            "lowest": lowest,
        }
        return state_of({"latch": self._latch}) | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the moving averages and the latch."""
        load_into({"latch": self._latch}, state)
        self._first, self._count = state["first"], state["count"]
        self._mean, self._variance = state["mean"], state["variance"]
        self._lowest = math.inf if state["lowest"] is None else state["lowest"]
