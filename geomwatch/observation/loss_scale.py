"""The units in which a change of the loss is counted: its own noise, and what it has covered."""

from __future__ import annotations

import math

from geomwatch.isolation.state import Kept, Resumable


class LossScale(Resumable):
    """Mean, range and noise of the losses so far; none of them knows where zero is.

    `mean` is exponential, weight `smoothing` on the past, corrected for its start. `noise` is the
    standard deviation of a single loss, sqrt(EMA((L_t - L_t-1)^2) / 2): of successive differences,
    because a trend is no noise. From loss `young` on none of them counts for more than `most` noise
    standard deviations, so that a blow-up does not pass for noise.
    """

    count: Kept[int]
    lowest: Kept[float | None]
    fallen: Kept[float]
    _highest: Kept[float]
    _sum: Kept[float]
    _variance: Kept[float]
    _last: Kept[float | None]

    def __init__(
        self,
        *,
        smoothing: float = 0.8,
        noise_smoothing: float = 0.98,
        most: float = 3.0,
        young: int = 10,
        least: int = 5,
    ) -> None:
        self._smoothing, self._noise_smoothing = smoothing, noise_smoothing
        self._most, self._young, self._least = most, young, least
        self.count = 0
        self.lowest = None  # mean, from loss `least` on
        self.fallen = 0.0  # by how much the mean has come down to there: what was learnt
        self._highest = -math.inf
        self._sum = 0.0  # without bias correction
        self._variance = 0.0
        self._last = None

    def update(self, loss: float) -> None:
        """Take in a loss; one that is not finite is passed over."""
        if not math.isfinite(loss):
            return
        self.count += 1
        self._sum = self._smoothing * self._sum + (1 - self._smoothing) * loss
        deviation = 0.0 if self._last is None else abs(loss - self._last) / math.sqrt(2)
        self._last = loss
        if self.count > self._young:
            deviation = min(deviation, self._most * self.noise)
        keep = self._noise_smoothing
        self._variance = keep * self._variance + (1 - keep) * deviation * deviation
        mean = self.mean
        self._highest = max(self._highest, mean)
        if self.count >= self._least and (self.lowest is None or mean < self.lowest):
            self.lowest, self.fallen = mean, self._highest - mean

    @property
    def mean(self) -> float:
        """The smoothed loss."""
        return self._sum / (1 - self._smoothing ** max(self.count, 1))

    @property
    def noise(self) -> float:
        """The standard deviation of a single loss."""
        known = 1 - self._noise_smoothing ** max(self.count - 1, 1)
        return math.sqrt(self._variance / known)

    @property
    def range(self) -> float:
        """What the smoothed loss has come down by, and no less than the noise of a single one."""
        return max(self.fallen, self.noise)
