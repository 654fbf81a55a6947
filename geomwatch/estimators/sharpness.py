"""Sharpness along the gradient."""

from __future__ import annotations

from torch import Tensor

from geomwatch.estimators.lanczos import Operator


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
