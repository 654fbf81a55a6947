"""Sharpness along the gradient, by a Hessian-vector product or by losses."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from geomwatch.estimators.lanczos import Operator
from geomwatch.estimators.noise_floor import LossAt, Readout
from geomwatch.records import Estimate

_SECOND_ORDER = 1e-3  # of the loss: what the step is chosen to change by curvature alone
_TRIES = 6
_AGREE = 0.05  # of two quotients, relative


def directional_sharpness(
    hvp: Operator, gradient: Tensor, *, weight: Tensor | None = None
) -> float:
    """Return the batch sharpness g'Hg / g'g, or its preconditioned form.

    With the diagonal `weight` P^-1 it is g'P^-1 H P^-1 g / g'P^-1 g: the curvature the
    preconditioned step -P^-1 g meets. On mini-batches it is this that settles at the stability
    limit, not lambda_max (Andreyev and Beneventano 2024). In units of loss / weight^2 (times
    P^-1). Signed: negative where the loss is concave along the step. One HVP.
    """
    step = gradient if weight is None else weight * gradient
    squared = float(gradient @ step)
    if squared == 0:
        raise ValueError("the gradient is zero, so it has no direction")
    return float(step @ hvp(step)) / squared


def sharpness_by_losses(
    loss_at: LossAt, direction: Tensor, readout: Readout, *, slope: float
) -> Estimate:
    """Return d'Hd / g'd from losses alone, for what has no Hessian-vector product.

    (L(w + h d) - 2 L(w) + L(w - h d)) / (h^2 g'd), at first with h such that curvature changes the
    loss by 0.1 %, then with halves of it until two agree to 5 %, or rounding decides (6 to 20
    forward passes). The error is their difference, at least what the noise floor lets through.

    Withheld where differences of losses have no meaning, and where no two agree.

    Args:
        direction: (D,) d, the gradient g or the preconditioned one.
        slope: g'd > 0.
    """
    if readout.reason:
        return Estimate(None, status="withheld", reason=readout.reason)
    if not slope > 0:
        return Estimate(None, status="withheld", reason="the gradient is zero")

    def bend(h: float) -> float:
        """h^2 d'Hd, as the losses have it."""
        return loss_at(h * direction) + loss_at(-h * direction) - 2 * readout.loss

    wanted = 2 * max(_SECOND_ORDER * abs(readout.loss), 30 * readout.floor)
    h = _fitting(bend, wanted, start=0.03 * max(abs(readout.loss), readout.floor) / slope)
    coarse = bend(h) / h**2
    for _ in range(_TRIES):
        h /= 2
        fine = bend(h) / h**2
        error = max(abs(coarse - fine), 4 * readout.floor / h**2)
        if abs(coarse - fine) <= max(_AGREE * abs(fine), 8 * readout.floor / h**2):
            reason = "by differences of losses"
            return Estimate(fine / slope, error / slope, "residual", reason=reason)
        coarse = fine
    reason = (
        "differences of losses at two distances do not agree: the loss has kinks along the step"
    )
    return Estimate(None, status="withheld", reason=reason)


def _fitting(bend: Callable[[float], float], wanted: float, *, start: float) -> float:
    """Return a step at which the loss bends by about what is wanted."""
    h = start
    for _ in range(_TRIES):
        found = abs(bend(h))
        if wanted / 4 <= found <= 4 * wanted:
            break
        h *= min(max(math.sqrt(wanted / found), 1 / 32), 32) if 0 < found < math.inf else 1 / 8
    return h
