"""A margin at any learning rates, and what is remembered of several: it is linear in the rate."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.records import Estimate

OF_THE_RATE = ("stability_margin", "stochastic_margin", "gradient_margin")  # estimates linear in it
_LEAST = 1e-3  # a margin below this, or of the wrong sign, counts as this in a geometric mean


def growth(rates: Sequence[float], before: Sequence[float]) -> float:
    """Return the largest factor by which a group's rate has grown; 1 where none was positive."""
    pairs = zip(rates, before, strict=False)
    return max((now / then for now, then in pairs if then > 0), default=1.0)


def within(cap: float, rates: Sequence[float]) -> float:
    """Return the factor of all rates that brings the largest down to a cap; 1 where it is below."""
    largest = max(rates, default=0.0)
    return 1.0 if largest <= cap or largest <= 0 else cap / largest


def value_of(estimate: Estimate | None) -> float | None:
    """Return what was measured now and means what it says; None for what is held or withheld."""
    return estimate.value if estimate is not None and estimate.status == "ok" else None


def scaled(margin: Estimate | None, factor: float) -> Estimate | None:
    """Return a margin at `factor` times its learning rates."""
    if margin is None or margin.value is None or factor == 1:
        return margin
    error = None if margin.error is None else factor * margin.error
    return replace(margin, value=factor * margin.value, error=error)


def scaled_each(found: Mapping[str, Estimate], factor: float) -> dict[str, Estimate]:
    """Return estimates with the margins among them at `factor` times their learning rates."""
    margins = {name: found[name] for name in OF_THE_RATE if name in found}
    return {**found, **{name: scaled(e, factor) or e for name, e in margins.items()}}


@dataclass(frozen=True, slots=True)
class Margin:
    """A margin as it was measured, and at which rates; nothing at all before the first one.

    At other rates it is as many times larger as the group that has grown most, which overestimates
    it where groups have changed their rates among each other.
    """

    estimate: Estimate | None = None
    rates: tuple[float, ...] = ()

    def growth(self, rates: Sequence[float]) -> float:
        """Return the largest factor by which a group's rate has grown since."""
        return 1.0 if rates == self.rates else growth(rates, self.rates)

    def at(self, rates: Sequence[float]) -> Estimate | None:
        """Return the margin at these rates."""
        return scaled(self.estimate, self.growth(rates))


class SmoothedMargin(Resumable):
    """Exponential mean of the absolute value of a margin: weight `smoothing` on the past.

    Corrected for its start, and moved to the rates of each measurement as a `Margin` is.
    """

    _sum: Kept[float]
    _weight: Kept[float]
    _rates: Kept[tuple[float, ...]]

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._sum = 0.0  # at the rates below, without correction
        self._weight = 0.0  # 1 - smoothing^n after n measurements
        self._rates = ()

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
        past = self._smoothing * self._sum * growth(rates, self._rates)
        self._sum = past + (1 - self._smoothing) * value
        self._weight = self._smoothing * self._weight + (1 - self._smoothing)
        self._rates = tuple(rates)
        return True

    def at(self, rates: Sequence[float]) -> float:
        """Return the margin at these rates; 0 if nothing is known."""
        return self._sum / self._weight * growth(rates, self._rates) if self.known else 0.0


class RecentMargins(Resumable):
    """The last `most` measurements of a margin, each over the rate it was made at.

    One batch differs from the next, so that rules judge a mean of several. The largest rate of the
    groups stands for all of them: two numbers a measurement, however many groups there are.
    """

    _measured: Kept[deque[tuple[int, float]]]

    def __init__(self, most: int) -> None:
        self._measured = deque(maxlen=most)  # step, margin / rate

    def add(self, step: int, rate: float, margin: float) -> None:
        """Add one that was measured at this rate; at a rate of 0 nothing is learnt."""
        if rate > 0:
            self._measured.append((step, margin / rate))

    def mean(
        self, step: int, rate: float, *, steps: int, most: int | None = None
    ) -> tuple[float | None, int]:
        """Return the geometric mean of the last `most` within `steps`, at this rate, and the count.

        None if there is none.
        """
        last = list(self._measured)[-(most or len(self._measured)) :]
        recent = [rate * m for at, m in last if step - at <= steps]
        if not recent:
            return None, 0
        return statistics.geometric_mean(max(m, _LEAST) for m in recent), len(recent)
