"""Is the loss that a probe computes the one that Lightning trains on? Asked before the first."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geomwatch import batches
from geomwatch.checks import check_loss
from geomwatch.errors import UsageError
from geomwatch.integrations._lightning_loss import MicroBatch, StepLoss
from geomwatch.isolation import isolated

_LOSS_TOLERANCE = 1e-2  # relative; a forward pass may move a spectral norm's vectors a little
_ANGLE_TOLERANCE = 5e-2  # between directions
_SAME = "on the same batch, weights and random state"


def difference_to_training(
    module: nn.Module, loss_fn: StepLoss, window: Sequence[MicroBatch], params: Sequence[Tensor]
) -> tuple[str, str]:
    """Evaluate a window again as in training; say how its loss, and its gradient, differ.

    With the same kernels, random state and precision they agree to rounding. Both are "" if they
    do; the second also where the gradient says nothing (see `_turned`). `params` hold the gradient
    as it is before clipping. Costs a forward and a backward pass for each micro-batch.

    Raises:
        UsageError: the loss steps an optimizer, or is none.
    """
    loss, gradients = _replay(module, loss_fn, window, params)
    trained = _mean_loss(window)
    if math.isfinite(trained) and abs(loss - trained) > _LOSS_TOLERANCE * abs(trained) + 1e-6:
        return f"{loss:.6g} where {trained:.6g} is trained on, {_SAME}", ""
    turned = _turned(gradients, params)
    if turned > _ANGLE_TOLERANCE:
        return "", f"{turned:.0%} apart from that of the loss, {_SAME}"
    return "", ""


def refuse(difference: str) -> None:
    """Refuse a training_step whose loss comes out otherwise.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"training_step must give the same loss when it is evaluated again, got {difference}: it "
        "depends on what it changes itself (a counter, a queue) or on chance of its own. Curvature "
        "of another loss would be measured. Pass GeomwatchCallback(loss_fn=...), a function "
        "(module, batch) -> loss, or give the module a method geometry_loss(batch)."
    )


def _replay(
    module: nn.Module, loss_fn: StepLoss, window: Sequence[MicroBatch], params: Sequence[Tensor]
) -> tuple[float, list[Tensor]]:
    loss, gradients = 0.0, [torch.zeros_like(p) for p in params]
    with isolated(
        module,
        params,
        others=loss_fn.isolates(),
        mode="train",
        autocast=True,
        second_order=False,
    ) as snapshot:
        snapshot.restore()
        for micro in window:
            part = check_loss(loss_fn(module, batches.fresh_copy(micro))) / len(window)
            loss += float(part.detach())
            for total, g in zip(gradients, _gradient(part, params), strict=True):
                if g is not None:
                    total.add_(g)
    return loss, gradients


def _gradient(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    found: Sequence[Tensor | None] = torch.autograd.grad(loss, params, allow_unused=True)
    return found


def _mean_loss(window: Sequence[MicroBatch]) -> float:
    known = [float(m.call.loss) for m in window if m.call is not None and m.call.loss is not None]
    return sum(known) / len(known) if len(known) == len(window) else math.nan


def _turned(gradients: Sequence[Tensor], params: Sequence[Tensor]) -> float:
    """Return the distance between the directions of `gradients` and of what is stepped with.

    0 where there is nothing to compare: hooks on parameters bend the latter, and the first steps
    under a GradScaler make it infinite.
    """
    if any(_has_hooks(p) for p in params):
        return 0.0
    own = _flat(gradients)
    stepped = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    norms = float(own.norm()), float(stepped.norm())
    if not all(0 < norm < math.inf for norm in norms):
        return 0.0
    return float((own / norms[0] - stepped / norms[1]).norm())


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([(t.to_dense() if t.is_sparse else t).reshape(-1).float() for t in tensors])


def _has_hooks(p: Tensor) -> bool:
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)
