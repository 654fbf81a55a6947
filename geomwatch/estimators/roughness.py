"""Roughness: how the loss varies along random slices, and what of that is no parabola."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from geomwatch.estimators.noise_floor import LossAt, Readout
from geomwatch.records import Estimate
from geomwatch.vectors.layout import Layout

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Slices:
    """L(w + alpha v) along m random directions v on one symmetric grid of alpha."""

    alphas: Floats  # (n,)
    losses: Floats  # (m, n)
    readout: Readout
    reason: str = field(default="")  # why there are no slices


def filter_normalised(layout: Layout, rng: torch.Generator) -> Tensor:
    """Draw a Gaussian direction whose filters are as long as those of the weights.

    A filter is what belongs to one index of dimension 0; tensors of one dimension (biases,
    normalisation scales) are left where they are (Li et al. 2018, "Visualizing the loss landscape
    of neural nets").
    """  # (D,)
    tiny = torch.finfo(layout.dtype).tiny
    drawn, weights = layout.filters(layout.normal(rng)), layout.filters(layout.values())
    pieces = []
    for p, noise, w in zip(layout.params, drawn, weights, strict=True):
        lengths = w.norm(dim=1, keepdim=True) * (p.dim() > 1)
        pieces.append(noise * (lengths / noise.norm(dim=1, keepdim=True).clamp_min(tiny)))
    return layout.flatten(pieces)


def take_slices(
    loss_at: LossAt,
    layout: Layout,
    readout: Readout,
    *,
    rng: torch.Generator,
    directions: int = 4,
    points: int = 11,
    amax: float = 0.05,
) -> Slices:
    """Evaluate the loss along filter-normalised Gaussian directions, at |alpha| <= amax.

    alpha is relative: at alpha = 0.05 every filter has moved by 5 % of its norm. Costs
    `directions` x (`points` - 1) forward passes; none for a loss that can't be read.

    Raises:
        ValueError: one direction has no error bar, an even grid misses alpha = 0, and fewer than
            five points leave nothing beside a parabola.
    """
    if directions < 2:
        raise ValueError(f"directions must be >= 2 to give a standard error, got {directions}")
    if points < 5 or points % 2 == 0:
        raise ValueError(f"points must be odd and >= 5, got {points}")
    alphas = np.linspace(-amax, amax, points)
    reason = readout.reason
    if not reason and all(p.dim() < 2 for p in layout.params):
        reason = "no parameter has two or more dimensions, so there are no filters to move"
    losses = []
    for _ in range(0 if reason else directions):
        v = filter_normalised(layout, rng)
        losses.append([loss_at(a * v) if a else readout.loss for a in alphas.tolist()])
    if not np.isfinite(losses).all():
        reason, losses = "the loss is not finite on the slices", []
    return Slices(alphas, np.array(losses), readout, reason)


def roughness(slices: Slices) -> Estimate:
    """Return R = Var_alpha[L(w + alpha v)], the mean over directions and its standard error.

    The paper's directional roughness, in units of loss^2. Where the slice is a parabola
    R = (v'g)^2 <alpha^2> + (v'Hv)^2 Var(alpha^2) / 4: mostly slope and curvature, so compare it
    within a run; `roughness_residual` is what they leave. 0 HVPs.

    Withheld where two evaluations of the same point differ beyond rounding, and where R itself is
    rounding.
    """
    if slices.reason:
        return Estimate(None, status="withheld", reason=slices.reason)
    variances = slices.losses.var(axis=1)
    if variances.mean() <= slices.readout.floor**2:
        return _below(slices, "variation along the slices", math.sqrt(variances.mean()))
    return _mean(variances)


def roughness_residual(slices: Slices) -> Estimate:
    """Return the share of R that a parabola leaves, ||L - fit||^2 / (n-3) / R. Without unit.

    The mean over directions and its standard error; the reason gives the micro-scale (see
    `micro_scale`). 0 for a quadratic loss, about 1 for noise. 0 HVPs.

    Withheld as R is, and where what is left is less than twice the noise floor of the loss.
    """
    total = roughness(slices)
    if total.value is None:
        return total
    scaled = slices.alphas / slices.alphas.max()
    powers = np.stack([np.ones_like(scaled), scaled, scaled**2], axis=1)  # (n, 3)
    heights = (slices.losses - slices.readout.loss).T  # (n, m)
    fit = powers @ np.linalg.lstsq(powers, heights, rcond=None)[0]
    left = ((heights - fit) ** 2).sum(axis=0) / (len(scaled) - 3)  # (m,)
    if left.mean() <= (2 * slices.readout.floor) ** 2:
        return _below(slices, "rest beside a parabola", math.sqrt(left.mean()))
    reason = f"micro-scale s = {micro_scale(slices):.2g}, noise floor {slices.readout.floor:.2g}"
    variances = slices.losses.var(axis=1)
    return _mean(np.divide(left, variances, where=variances > 0, out=np.zeros_like(left)), reason)


def micro_scale(slices: Slices) -> float:
    """Return s, the root mean square of ruggedness at the grid's own scale. In units of loss.

    s^2 = mean(d3^2) / 20 over third differences d3, which a parabola leaves at 0, white noise at
    its variance (20 = 1 + 9 + 9 + 1), and a ripple of amplitude a shorter than the grid at a^2 / 2.
    """
    return math.sqrt((np.diff(slices.losses, n=3, axis=1) ** 2).mean() / 20)


def _mean(values: Floats, reason: str = "") -> Estimate:
    return Estimate(float(values.mean()), _stderr(values), "stderr", reason=reason)


def _stderr(values: Floats) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _below(slices: Slices, what: str, size: float) -> Estimate:
    floor = slices.readout.floor
    reason = f"the {what} ({size:.2g}) is lost in the noise of the loss (floor {floor:.2g})"
    return Estimate(None, status="withheld", reason=reason)
