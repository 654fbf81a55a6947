"""Means over seeds with their errors, ratios of them, and rank correlations with intervals."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

LEVEL = 0.95
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Mean:
    """The mean of some seeds, and its standard error from their spread."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The mean; None without values."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def error(self) -> float | None:
        """The standard error; None for fewer than two values."""
        if len(self.values) < 2:
            return None
        return float(np.std(self.values, ddof=1)) / math.sqrt(len(self.values))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval by Student's t."""
        if self.mean is None or self.error is None:
            return None
        half = float(stats.t.ppf((1 + LEVEL) / 2, len(self.values) - 1)) * self.error
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        if self.mean is None:
            return "-"
        return number(self.mean) + ("" if self.error is None else f" ± {number(self.error, 2)}")


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{number(self.value, 2)} [{number(self.low, 2)}, {number(self.high, 2)}]"


def ratio(a: Mean, b: Mean) -> Interval | None:
    """Return the ratio of geometric means, with Welch's interval of the difference of logarithms.

    None where there are fewer than two values of either, or one is not positive.
    """
    if min(len(a.values), len(b.values)) < 2 or min(*a.values, *b.values) <= 0:
        return None
    logs = [np.log(m.values) for m in (a, b)]
    squares = [float(x.var(ddof=1)) / len(x) for x in logs]
    middle, total = float(logs[0].mean() - logs[1].mean()), sum(squares)
    half = 0.0
    if total > 0:
        freedom = total**2 / sum(s**2 / (len(x) - 1) for s, x in zip(squares, logs, strict=True))
        half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * math.sqrt(total)
    low, high = (math.exp(min(x, 700.0)) for x in (middle - half, middle + half))
    return Interval(math.exp(middle), low, high)


def correlation(
    x: Sequence[float],
    y: Sequence[float],
    groups: Sequence[str],
    *,
    strata: Sequence[str] | None = None,
    resamples: int,
) -> Interval | None:
    """Return Spearman's rank correlation with a percentile interval of a bootstrap over groups.

    Whole groups (the seeds of one configuration) are drawn, since their members are alike. With
    `strata` ranks are taken within each of them and groups are drawn there: what is left of a
    correlation when differences between the strata play no part. None where there is nothing to
    correlate.
    """
    labels = ("",) * len(groups) if strata is None else tuple(strata)
    if len(x) < 4 or len(set(groups)) < 3:
        return None
    codes = np.unique(labels, return_inverse=True)[1]
    columns = [stats.rankdata(column) for column in (x, y)]  # ties stay ties

    def of(rows: Integers) -> Floats:
        """The correlation of each row of indices, NaN where one of the two is constant."""
        return _pearson(*(_ranked(column[rows], codes[rows]) for column in columns))

    value = float(of(np.arange(len(x))[None])[0])
    found = np.concatenate([of(rows) for rows in resampled(tuple(groups), labels, resamples)])
    known = found[np.isfinite(found)]
    if not math.isfinite(value) or not len(known):
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


@functools.lru_cache(8)  # most quantities are known of the same runs
def resampled(groups: tuple[str, ...], strata: tuple[str, ...], resamples: int) -> list[Integers]:
    """Draw whole groups with replacement within each stratum, as indices of their members.

    Each array holds the resamples of one length, (resamples, length): groups may differ in size.
    """
    rng = np.random.default_rng(0)
    members: dict[str, dict[str, list[int]]] = {}
    for i, (group, stratum) in enumerate(zip(groups, strata, strict=True)):
        members.setdefault(stratum, {}).setdefault(group, []).append(i)
    drawn: dict[int, list[list[int]]] = {}
    for _ in range(resamples):
        chosen: list[int] = []
        for own in members.values():
            names = list(own)
            for pick in rng.integers(0, len(names), len(names)):
                chosen += own[names[pick]]
        drawn.setdefault(len(chosen), []).append(chosen)
    return [np.array(rows) for rows in drawn.values()]


def _ranked(values: Floats, codes: Integers) -> Floats:
    """Ranks within each stratum of each row, centred and in units of the stratum's size."""
    apart = values + codes * (values.max() + 1)  # one stratum behind the other
    ranks: Floats = stats.rankdata(apart, axis=1)
    centred = np.zeros_like(ranks)
    for code in np.unique(codes):
        own = codes == code
        count = own.sum(axis=1, keepdims=True)
        middle = (ranks * own).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        centred += own * (ranks - middle) / np.maximum(count, 1)
    return centred


def _pearson(x: Floats, y: Floats) -> Floats:
    """Correlations row by row of what is centred; NaN where something does not vary."""
    scale = np.sqrt((x**2).sum(axis=1) * (y**2).sum(axis=1))
    products = (x * y).sum(axis=1)
    return np.where(scale > 1e-12, products / np.maximum(scale, 1e-12), np.nan)


def number(value: float, digits: int = 3) -> str:
    """Write a number with so many significant digits, without an exponent where that is short."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < digits + 3:
        places = max(0, digits - 1 - exponent)
        return f"{round(value, digits - 1 - exponent):.{places}f}"
    return f"{value:.{digits - 1}e}"
