"""The stochastic margin: stability of the mean square, where curvature differs between batches."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from geomwatch.estimators.noise import NO_ERROR, Spread, jackknife
from geomwatch.records import Estimate
from geomwatch.stability.recursion import Recursion


def stochastic_margin(spread: Spread, recursion: Recursion, *, curvature: float) -> Estimate:
    """Return M_ms, 1 where the mean square of steps along q stops shrinking. Without unit.

    From products H_b q of micro-batches with the top Ritz vector q (||q|| = 1): their spread gives
    the variance of a batch's curvature along q, V = tr(Sigma_Hq) / N, and `stochastic_margin_at`
    the margin; for heavy ball

        M_ms = eta [lambda / (2(1+mu)) + V / (2 lambda (1-mu))],

    lambda = q'Hq. Never below the deterministic margin, which is its first part (V = 0). K
    micro-batches: no HVPs beyond the one that was accumulated over them. The error is the
    jackknife's over micro-batches; none for two.

    Withheld where the curvature is not positive.

    Args:
        spread: of the pairs (items, H_b q).
        recursion: the coming step; with q and H_b in coordinates scaled by S (see `stability`) the
            rate is its threshold, since S has taken up eta / threshold.
        curvature: lambda.
    """
    if not curvature > 0:
        reason = f"the curvature along the top Ritz vector is not positive ({curvature:.3g})"
        return Estimate(None, status="withheld", reason=reason)

    def margin(noise: float) -> float:
        return stochastic_margin_at(recursion, curvature, max(noise, 0.0) / spread.items)

    value = margin(spread.all.noise)
    if not math.isfinite(value):
        return Estimate(None, status="withheld", reason="no learning rate is stable in this step")
    if not spread.without:
        return Estimate(value, reason=NO_ERROR)
    return Estimate(value, jackknife([margin(m.noise) for m in spread.without]), "stderr")


def stochastic_margin_at(recursion: Recursion, curvature: float, variance: float) -> float:
    """Return the factor M by which rates are too large: at rate / M the mean square just holds.

    h is drawn anew at each step, with mean `curvature` > 0 and `variance`. With direct = 0 and
    keep = 1 (heavy ball, Adam) M is linear in the rate and exact in closed form; else it is
    bisected on the spectral radius of the map of the second moments, keep held fixed. inf where
    no rate is stable.
    """
    r = recursion
    if r.memory >= 1:
        return math.inf
    if r.direct == 0 and r.keep == 1:
        push, b = r.rate * r.through * r.intake, r.memory
        noise = variance / (2 * curvature * (1 - b))
        return push * (curvature / (2 * (1 + b)) + noise)
    low, high = 0.0, 1.0  # factors of the rate
    while _radius(r, high, curvature, variance) < 1:
        low, high = high, 2 * high
        if not math.isfinite(high):
            return 0.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        if _radius(r, middle, curvature, variance) < 1:
            low = middle
        else:
            high = middle
        if high < 1e-300:
            return math.inf
    return 2 / (low + high)


def _radius(r: Recursion, factor: float, curvature: float, variance: float) -> float:
    found: float = abs(np.linalg.eigvals(second_moment_map(r, factor, curvature, variance))).max()
    return found


def second_moment_map(
    r: Recursion, factor: float, curvature: float, variance: float
) -> npt.NDArray[np.float64]:
    """Return the matrix that takes (E w^2, E wm, E m^2) one step on, at `factor` times the rate.

    w' = A w + B m, m' = C w + D m, where A = keep - rate (direct + through intake) h and
    C = intake h are random. The margin is where its spectral radius reaches 1.
    """  # (3, 3)
    rate = factor * r.rate
    push = rate * (r.direct + r.through * r.intake)
    second = curvature**2 + variance
    a, b = r.keep - push * curvature, -rate * r.through * r.memory
    c, d = r.intake * curvature, r.memory
    aa = r.keep**2 - 2 * r.keep * push * curvature + push**2 * second
    ac = r.intake * (r.keep * curvature - push * second)
    cc = r.intake**2 * second
    return np.array([[aa, 2 * a * b, b * b], [ac, a * d + b * c, b * d], [cc, 2 * c * d, d * d]])
