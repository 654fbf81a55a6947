"""Counts and medians with their confidence intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

_LEVEL = 0.95


@dataclass(frozen=True)
class Share:
    """k of n, with its 95 % Clopper-Pearson interval."""

    k: int
    n: int

    @property
    def value(self) -> float:
        return self.k / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """Exact: the values of p under which k is not among the 2.5 % rarest on either side."""
        tail = (1 - _LEVEL) / 2
        if not self.n:
            return 0.0, 1.0
        low = 0.0 if self.k == 0 else float(beta.ppf(tail, self.k, self.n - self.k + 1))
        high = 1.0 if self.k == self.n else float(beta.ppf(1 - tail, self.k + 1, self.n - self.k))
        return low, high

    def __str__(self) -> str:
        if not self.n:
            return "-"
        low, high = self.interval
        return f"{self.k}/{self.n} = {self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Median:
    """A median with its 95 % bootstrap interval (percentiles of 4,000 resamples)."""

    values: Sequence[float]

    @property
    def value(self) -> float:
        return float(np.median(self.values)) if len(self.values) else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return bootstrap(np.median, self.values)

    def __str__(self) -> str:
        if not len(self.values):
            return "-"
        low, high = self.interval
        return f"{self.value:.0f} [{low:.0f}, {high:.0f}]"


def bootstrap(
    statistic: Callable[..., np.ndarray], values: Sequence[float], resamples: int = 4000
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic; the same for the same values."""
    if not len(values):
        return float("nan"), float("nan")
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    draws = data[rng.integers(0, len(data), (resamples, len(data)))]
    low, high = np.quantile(statistic(draws, axis=1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
