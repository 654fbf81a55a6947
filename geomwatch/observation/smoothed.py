"""A margin remembered between measurements, at whatever rates the coming step has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from geomwatch.records import Estimate


class SmoothedMargin:
    """Exponential mean of the absolute value of a margin, re-scaled to the rates of a step.

    A margin is linear in the rate, so that m / eta is averaged: weight `smoothing` on the past,
    corrected for its start. Where groups have changed their rates among each other the largest
    growth counts, which overestimates the margin.
    """

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._sum = 0.0  # at the rates below, without correction
        self._weight = 0.0  # 1 - smoothing^n after n measurements
        self._rates: tuple[float, ...] = ()

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._weight > 0

    def update(
        self, margin: Estimate | None, rates: Sequence[float], *, with_error: bool = False
    ) -> bool:
        """Take in a measurement or, `with_error`, its upper bound; False if it is not trusted."""
        if margin is None or margin.value is None or margin.status != "ok":
            return False
        value = abs(margin.value) + (margin.error or 0.0 if with_error else 0.0)
        if not math.isfinite(value) or not max(rates, default=0.0) > 0:
            return False
        past = self._smoothing * self._sum * growth(rates, self._rates) if self._rates else 0.0
        self._sum = past + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        self._rates = tuple(rates)
        return True

    def at(self, rates: Sequence[float]) -> float:
        """Return the margin at these rates; 0 if nothing is known."""
        if not self.known:
            return 0.0
        return self._sum / self._weight * growth(rates, self._rates)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and its rates."""
        return {"sum": self._sum, "weight": self._weight, "rates": list(self._rates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the mean and its rates."""
        self._sum, self._weight = state["sum"], state["weight"]
        self._rates = tuple(state["rates"])


def growth(rates: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest factor by which a group's rate has grown; 0 where none is positive."""
    return max(
        (now / then for now, then in zip(rates, reference, strict=False) if then > 0), default=0.0
    )
