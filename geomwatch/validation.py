"""Does double backward give the derivative of the gradient? Some code makes it silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.errors import UsageError
from geomwatch.objective import LossFn, Objective
from geomwatch.vectors import generator

_ITEMS = 4
_PIECES_AGREE = 1e-4

_TOLERANCE = 1e-2  # the silent cases are off by 8 % and more
# A model may compute parts of itself in float32, whatever its parameters (as an RMSNorm does):
# then the smallest step drowns in rounding and a larger one must serve.
_SHARES = (1e-6, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, slots=True)
class Validation:
    """What a check of the double-backward HVP against differences of gradients has found."""

    passed: bool | None  # None when it could not be run
    error: float | None = None  # relative
    reason: str = ""


def validate(objective: Callable[[], Objective]) -> Validation:
    """Compare H v by double backward with a difference of gradients, along one random v.

    A backward that is not differentiable (raw tensors kept on ctx, computed without a graph) or a
    gradient field whose Jacobian is not symmetric shows here and nowhere else. `objective` makes
    the loss in float64 on a few items, where a step can be so small that it crosses no kink of a
    ReLU. Costs one HVP and up to eight gradients of those few items.
    """
    try:
        with objective() as tested:
            errors, spread = _compare(tested)
    except Exception as failure:
        return Validation(None, reason=f"it could not be run: {type(failure).__name__}: {failure}")
    error = min(errors)
    if error <= _TOLERANCE:
        return Validation(True, error)
    if spread > error / 3:
        reason = f"differences of gradients disagree among themselves by {spread:.0%}"
        return Validation(None, error, reason)
    return Validation(
        False,
        error,
        f"double backward is off by {error:.0%} against differences of gradients: some backward "
        "in the loss is not differentiable, although it does not say so",
    )


def choose_backend(
    model: nn.Module, loss_fn: LossFn, batch: Any, hvp: str, options: Mapping[str, Any]
) -> tuple[str, dict[str, str | int | float | bool]]:
    """Check `micro_batch`, validate double backward; return the backend and what was found.

    "auto" becomes "finite_difference" where double backward is wrong.
    """
    check_micro_batches(model, loss_fn, batch, options)
    if hvp == "finite_difference":
        return hvp, {"validated": False, "validation": "differences of gradients check themselves"}
    few = batches.head(batch, min(_ITEMS, batches.items(batch)))
    tested = {**options, "operator": "hessian", "hvp": "double_backward", "dtype": torch.float64}
    found = validate(lambda: Objective(model, loss_fn, [few], **tested))
    if found.passed is None:  # of a model made for one precision: in that one, if it is smooth
        inherent = validate(lambda: Objective(model, loss_fn, [few], **{**tested, "dtype": None}))
        found = found if inherent.passed is None else inherent
    facts: dict[str, str | int | float | bool] = {"validated": found.passed is True}
    if found.error is not None:
        facts["validation_error"] = found.error
    if found.reason:
        facts["validation"] = found.reason
    wrong = found.passed is False and hvp == "auto"
    return "finite_difference" if wrong else hvp, facts


def check_micro_batches(
    model: nn.Module, loss_fn: LossFn, batch: Any, options: Mapping[str, Any]
) -> None:
    """Compare the loss of the whole batch with the weighted mean over its pieces, once.

    Raises:
        UsageError: they differ by more than 1e-4: a loss over the whole batch, or BatchNorm.
    """
    size = options.get("micro_batch")
    if size is None or size >= batches.items(batch):
        return
    with Objective(model, loss_fn, [batch], **{**options, "micro_batch": None}) as whole:
        normalizes = whole.normalizes_batches
    if normalizes:
        raise UsageError(
            f"micro_batch must not cut the batches of a BatchNorm in train mode, got {size}: each "
            "piece would have its own statistics. Leave micro_batch out, or pass mode='eval'."
        )
    difference = _difference_of_pieces(model, loss_fn, batch, dict(options))
    if difference > _PIECES_AGREE:  # dropout draws other masks for the pieces: without it, then?
        difference = _difference_of_pieces(model, loss_fn, batch, {**options, "mode": "eval"})
    if difference > _PIECES_AGREE:
        raise UsageError(
            f"micro_batch must leave the loss as it is, got {size}, with which it differs by "
            f"{difference:.1e}: it is no mean over items. Leave micro_batch out."
        )


def _difference_of_pieces(
    model: nn.Module, loss_fn: LossFn, batch: Any, options: dict[str, Any]
) -> float:
    losses = []
    for size in (None, options["micro_batch"]):
        with Objective(model, loss_fn, [batch], **{**options, "micro_batch": size}) as objective:
            losses.append(objective.loss_at(objective.layout.values().zero_()))
    return abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-12)


def _compare(objective: Objective) -> tuple[list[float], float]:
    """Return the relative error at each step, and how far the differences lie apart at best."""
    v = objective.layout.normal(generator(0)).to(torch.float64)
    v = v / v.norm()
    hv = objective.hvp(v)
    norm, size = float(objective.gradient().norm()), float(hv.norm())
    errors: list[float] = []
    spreads = [math.inf]
    before: Tensor | None = None
    for share in _SHARES:
        step = min(share * norm / size, 0.1) if size > 0 else share
        ahead, behind = objective.gradient_at(step * v), objective.gradient_at(-step * v)
        difference = (ahead - behind) / (2 * step)
        scale = max(float(difference.norm()), size, 1e-12 * norm)
        errors.append(_relative(difference - hv, scale))
        if errors[-1] <= _TOLERANCE:
            break
        if before is not None:
            spreads.append(_relative(difference - before, scale))
        before = difference
    return errors, min(spreads)


def _relative(vector: Tensor, scale: float) -> float:
    error = float(vector.norm()) / scale if scale > 0 else 0.0
    return error if math.isfinite(error) else math.inf
