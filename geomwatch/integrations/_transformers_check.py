"""Is the loss that a probe computes the one that a Trainer trains on? Asked before the first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.checks import check_loss
from geomwatch.errors import UsageError
from geomwatch.integrations._transformers_loss import TrainerLoss, Window
from geomwatch.isolation import isolated
from geomwatch.vectors import Layout

_LOSS_TOLERANCE = 1e-3  # relative; a forward pass may move a spectral norm's vectors a little
_GRADIENT_TOLERANCE = 1e-2  # between directions; of gradients in 16 bits, which round as they sum:
_NARROW_TOLERANCE = 5e-2
_REMEDY = (
    "Curvature of another loss would be measured. Pass GeomwatchCallback(loss_fn=...), a function "
    "(model, inputs) -> the loss of a micro-batch that is trained on."
)
_SAME = "on the same batch, weights and random state"


def check_seen(window: Window, trainer: str) -> None:
    """Make sure that the window's loss is known from one call of compute_loss a micro-batch.

    Raises:
        UsageError: training_step has gone about it in another way.
    """
    calls = {len(step.calls) for step in window.steps}
    if all(step.call is not None and step.call.loss is not None for step in window.steps):
        return
    times = " and ".join(str(n) for n in sorted(calls))
    seen = "one without a tensor as its loss" if calls == {1} else f"{times} calls"
    raise UsageError(
        f"{trainer}.training_step must get its loss from one call of compute_loss, got {seen}. "
        f"{_REMEDY}"
    )


def check_reproduced(
    model: nn.Module, loss_fn: TrainerLoss, window: Window, *, trainer: str
) -> None:
    """Compute loss and gradient again as in training, and compare them with training's own.

    With the same kernels, random state and precision they agree to rounding. Costs a forward and a
    backward pass for each micro-batch, and two vectors of the model's size.

    Raises:
        UsageError: they differ.
    """
    layout = Layout.of(model)
    loss, gradient = _replay(model, loss_fn, window, layout)
    trained = float(window.loss)
    if _differ(loss, trained):
        raise UsageError(
            f"{trainer}.training_step must train on the loss that compute_loss returns, got "
            f"{trained:.6g} in training and {loss:.6g} from compute_loss, {_SAME}. {_REMEDY}"
        )
    turned = _turned(gradient, layout)
    narrow = any(p.dtype.itemsize < 4 for p in layout.params)
    if turned > (_NARROW_TOLERANCE if narrow else _GRADIENT_TOLERANCE):
        raise UsageError(
            f"{trainer}.training_step must train on the loss that compute_loss returns, got "
            f"gradients that lie {turned:.0%} apart, {_SAME}: it trains on something else as well. "
            f"{_REMEDY}"
        )


def difference_to_training(model: nn.Module, loss_fn: TrainerLoss, window: Window) -> str:
    """Say how a loss_fn of the user's differs from what is trained on; "" if it does not."""
    loss, _ = _replay(model, loss_fn, window, None)
    trained = float(window.loss)
    if not _differ(loss, trained):
        return ""
    return (
        f"loss_fn gives {loss:.6g} where the Trainer trains on {trained:.6g}, {_SAME}. Curvature "
        "is measured of loss_fn, and the stability margin is right for that loss only."
    )


def _replay(
    model: nn.Module, loss_fn: TrainerLoss, window: Window, layout: Layout | None
) -> tuple[float, Tensor | None]:
    """Return the loss of a window in training's own precision, and with a layout its gradient."""
    pieces = window.micro_batches()
    total = sum(loss_fn.weight(piece) for piece in pieces)
    trainable = [p for p in model.parameters() if p.requires_grad]
    loss, gradient = 0.0, None if layout is None else layout.zeros()
    with isolated(
        model,
        trainable,
        others=loss_fn.isolates(),
        mode="train",
        autocast=True,
        second_order=False,
    ) as snapshot:
        snapshot.restore()
        for piece in pieces:
            part = check_loss(loss_fn(model, batches.fresh_copy(piece)))
            part = part * (loss_fn.weight(piece) / total)
            loss += float(part.detach())
            if layout is not None and gradient is not None:
                found = torch.autograd.grad(part, layout.params, allow_unused=True)
                gradient.add_(layout.flatten(_filled(found, layout)))
    return loss, gradient


def _differ(loss: float, trained: float) -> bool:
    return math.isfinite(trained) and abs(loss - trained) > _LOSS_TOLERANCE * abs(trained) + 1e-6


def _turned(gradient: Tensor | None, layout: Layout) -> float:
    """Return the distance between the directions of `gradient` and of training's own.

    Clipping has changed the length of that one. Hooks on parameters bend it, and the first steps
    under a GradScaler make it infinite: then there is nothing to compare, and it is 0.
    """
    if gradient is None or any(_has_hooks(p) for p in layout.params):
        return 0.0
    trained = layout.flatten(_filled([p.grad for p in layout.params], layout))
    norms = float(trained.norm()), float(gradient.norm())
    if not all(0 < norm < math.inf for norm in norms):
        return 0.0
    return float((trained / norms[0] - gradient / norms[1]).norm())


def _filled(tensors: Sequence[Tensor | None], layout: Layout) -> list[Tensor]:
    pairs = zip(tensors, layout.params, strict=True)
    return [torch.zeros_like(p) if t is None else t.detach() for t, p in pairs]


def _has_hooks(p: Tensor) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)
