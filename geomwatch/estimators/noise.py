"""Gradient noise: how much micro-batches disagree, and what follows for batch size and temperature.

Micro-batches b of n_b items, N together, have gradients g_b = G + noise of covariance Sigma / n_b,
Sigma the covariance of one item's gradient. All here follows from their spread around the mean
g = sum_b n_b g_b / N, the gradient of the whole batch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geomwatch.records import Estimate

NO_SIGNAL = "the noise hides the gradient"
NO_ERROR = "no error from two micro-batches, nor from those of several ranks"

Pieces = Sequence[tuple[float, Tensor]]  # (n_b items, (D,) gradient or Hessian-vector product)


@dataclass(frozen=True, slots=True)
class Moments:
    """Unbiased estimates of what the mean over items is made of."""

    noise: float  # tr(Sigma), of one item: sum_b n_b ||x_b - x||^2 / (K-1)
    signal: float  # ||E x||^2: ||x||^2 - noise / N


@dataclass(frozen=True, slots=True)
class Spread:
    """The moments of K micro-batches of N items, and those with each one left out in turn."""

    items: float  # N
    all: Moments
    without: tuple[Moments, ...]  # K; none for K = 2


def spread_of(pieces: Pieces, *, weight: Tensor | None = None) -> Spread:
    """Measure how (items, vector) pairs of micro-batches spread around their mean.

    Uneven micro-batches count by their items. With a diagonal `weight` (D,), such as Adam's P^-1,
    in the norm x' diag(weight) x. Differences are taken before squares, so that a spread far
    smaller than the mean survives float32. No HVPs.

    Raises:
        ValueError: a single micro-batch has no spread.
    """
    if len(pieces) < 2:
        raise ValueError(
            f"pieces must hold two or more micro-batches, got {len(pieces)}. Accumulate the "
            "gradient over micro-batches, or split the batch."
        )
    items = [float(n) for n, _ in pieces]
    total = sum(items)
    mean = torch.zeros_like(pieces[0][1])
    for n, x in pieces:
        mean.add_(x, alpha=n / total)
    weighted = mean if weight is None else weight * mean
    found = [mean @ weighted]
    for _, x in pieces:
        off = x - mean
        found += [off @ (off if weight is None else weight * off), off @ weighted]
    square, *rest = torch.stack(found).tolist()  # one transfer
    squares, along = rest[::2], rest[1::2]
    scatter = sum(n * s for n, s in zip(items, squares, strict=True))
    without = []
    if len(pieces) > 2:
        for n, s, a in zip(items, squares, along, strict=True):
            t = n / (total - n)  # without x_b the mean moves by -t (x_b - x)
            moved, left = square - 2 * t * a + t * t * s, scatter - n * s * (1 + t)
            without.append(_moments(moved, left, total - n, len(pieces) - 1))
    return Spread(total, _moments(square, scatter, total, len(pieces)), tuple(without))


def pooled(local: Spread, total: Callable[[float], float]) -> Spread:
    """Join the spreads that several ranks have measured, each of its own micro-batches.

    `total` sums a number over the ranks. Both moments are unbiased on each, and so is their mean,
    weighted by items. Without the moments that leave a micro-batch out, and so without an error.
    """
    items = total(local.items)
    noise = total(local.items * local.all.noise) / items
    signal = total(local.items * local.all.signal) / items
    return Spread(items, Moments(noise, signal), ())


def _moments(square: float, scatter: float, items: float, count: int) -> Moments:
    noise = scatter / (count - 1)
    return Moments(noise, square - noise / items)


def gradient_noise_scale(spread: Spread) -> Estimate:
    """Return B_simple = tr(Sigma) / ||G||^2: the batch size at which noise equals signal, in items.

    From gradients of micro-batches (McCandlish et al. 2018); there S = tr(Sigma) and G2 = ||G||^2,
    here unbiased each for micro-batches of any sizes. Their ratio is noisy: average S and G2 over
    probes before dividing. The error is the jackknife's over micro-batches, of the linearised
    ratio; none for two. 0 HVPs. Withheld where G2 <= 0: the noise hides the signal.
    """
    noise, signal = spread.all.noise, spread.all.signal
    if signal <= 0:
        reason = (
            f"{NO_SIGNAL}: ||G||^2 = {signal:.2g} after taking off its noise "
            f"{noise / spread.items:.2g}; more items, or an average over probes, would show it"
        )
        return Estimate(None, status="withheld", reason=reason)
    scale = noise / signal
    return _with_error(scale, [(m.noise - scale * m.signal) / signal for m in spread.without])


def temperature(spread: Spread, *, lr: float, dim: int, momentum: float = 0.0) -> Estimate:
    """Return T = lr tr(Sigma_B) / (2 D (1-mu)), Sigma_B = Sigma / N that of the batch gradient.

    The temperature of the paper's SDE dw = -g dt + sqrt(2 T) dW at equal mean noise per parameter
    (Mandt, Hoffman, Blei 2017, for the SGD step as a sampler); SGD's noise is far from isotropic,
    so it is a scale, not a law. In units of loss. The error is the jackknife's over micro-batches;
    none for two. 0 HVPs.

    Args:
        lr: the learning rate.
        dim: D, the number of parameters.
        momentum: mu of heavy ball, whose steps add up to lr / (1-mu).
    """
    factor = lr / (2 * dim * (1 - momentum) * spread.items)
    return _with_error(factor * spread.all.noise, [factor * m.noise for m in spread.without])


def _with_error(value: float, left_out: Sequence[float]) -> Estimate:
    if not left_out:
        return Estimate(value, reason=NO_ERROR)
    return Estimate(value, jackknife(left_out), "stderr")


def jackknife(left_out: Sequence[float]) -> float:
    """Return the standard error of an estimate from its values with one piece of m left out.

    sqrt((m-1)/m sum_i (t_i - mean t)^2), exactly s / sqrt(m) where the estimate is a mean
    (Quenouille 1949, Tukey 1958).
    """
    m = len(left_out)
    return (m - 1) / math.sqrt(m) * statistics.stdev(left_out)
