"""The loss of a window, evaluated once more with training's own kernels and random state."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.curvature.checks import check_loss
from geomwatch.curvature.objective import LossFn
from geomwatch.isolation.isolation import isolated
from geomwatch.parallel.collectives import refuse_collectives
from geomwatch.parallel.ranks import Ranks
from geomwatch.parallel.sync_norm import is_synchronised
from geomwatch.vectors.fsdp import is_sharded, reshard
from geomwatch.vectors.layout import whole


def replay(
    model: nn.Module,
    loss_fn: LossFn,
    window: Iterable[tuple[float, Any]],
    *,
    params: Sequence[Tensor],
    isolates: Sequence[object],
    ranks: Ranks,
) -> tuple[float, list[Tensor]]:
    """Return the loss of a window of (share, micro-batch) pairs, and its gradient by `params`.

    In the precision of training, and not twice differentiable: what comes out must be what training
    itself has computed. The loss is this rank's own, the gradient the mean over ranks, as that in
    `p.grad` is. All ranks call it at the same moment.

    Raises:
        UsageError: the loss is no scalar, or exchanges tensors with other ranks.
        RankError: it failed on another rank.
    """
    loss = 0.0
    gradient = [torch.zeros_like(p) for p in params]
    sharded = is_sharded(params)
    if sharded:
        reshard(list(model.modules()))
    with (
        ranks.together(),
        isolated(
            model, params, others=isolates, mode="train", autocast=True, second_order=False
        ) as snapshot,
        _on_its_own(model, ranks),
    ):
        snapshot.restore()
        for share, micro in window:
            part = share * check_loss(loss_fn(model, batches.fresh_copy(micro)))
            loss += float(part.detach())
            found = _through_hosts(part, params) if sharded else _directly(part, params)
            for total, g in zip(gradient, found, strict=True):
                if g is not None:
                    total.add_(g)
    return loss, gradient if sharded else ranks.mean(gradient)


def turned(gradient: Sequence[Tensor], params: Sequence[Tensor]) -> float:
    """Return the distance between the directions of `gradient` and of the one that is stepped with.

    Clipping has changed the length of the latter. Hooks on parameters bend it, and the first steps
    under a GradScaler make it infinite: then there is nothing to compare, and it is 0.
    """
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in params):
        return 0.0
    own = _flat(gradient)
    stepped = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
    norms = float(own.norm()), float(stepped.norm())
    if not all(0 < norm < math.inf for norm in norms):
        return 0.0
    return float((own / norms[0] - stepped / norms[1]).norm())


def _directly(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, list(params), allow_unused=True)


def _through_hosts(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Differentiate by a backward pass, which averages over ranks and shards, as FSDP2 needs it.

    `isolated` has set the training's own gradients aside.
    """
    loss.backward()
    found = [p.grad for p in params]
    for p in params:
        p.grad = None
    return found


def _on_its_own(model: nn.Module, ranks: Ranks) -> contextlib.AbstractContextManager[None]:
    """Refuse a loss that needs other ranks, unless its layers do."""
    synchronised = is_sharded(list(model.parameters())) or is_synchronised(model.modules())
    if ranks.size == 1 or synchronised:
        return contextlib.nullcontext()
    return refuse_collectives()


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([whole(t).detach().reshape(-1).float() for t in tensors])
