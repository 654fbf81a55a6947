"""Is the loss that a probe computes the one that the host trains on? Asked once, before the first.

With the same kernels, random state and precision loss and gradient agree to rounding.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.curvature.checks import check_loss
from geomwatch.integrations._host.loss import HostLoss, MicroBatch
from geomwatch.isolation.isolation import isolated
from geomwatch.isolation.reach import generators_in
from geomwatch.isolation.signals import traceless
from geomwatch.isolation.sync_norm import is_synchronised
from geomwatch.parallel.collectives import refuse_collectives
from geomwatch.parallel.ranks import Ranks
from geomwatch.sinks.log import logger
from geomwatch.vectors.fsdp import is_sharded, reshard
from geomwatch.vectors.layout import whole

SAME = "on the same batch, weights and random state"


@dataclass(frozen=True, slots=True)
class Difference:
    """The loss of a window evaluated again, where it is not the one that was trained on."""

    loss: float
    trained: float
    is_here: bool  # or else on another rank


@traceless
def check_against_training(
    model: nn.Module,
    loss_fn: HostLoss,
    window: Sequence[MicroBatch],
    trained: float,
    *,
    params: Sequence[Tensor],
    ranks: Ranks,
    tolerance: float,
    refuse: Callable[[Difference], NoReturn],
    judge_angle: Callable[[float], None],
) -> None:
    """Evaluate a window again as in training, whose loss was `trained`, and compare.

    `params` hold the gradient that is stepped with, clipped or not. All ranks call it at once and
    come to the same verdict. Costs a forward and a backward pass for each micro-batch, and two
    vectors of the model's size.

    Args:
        tolerance: of the loss, relative to it.
        refuse: called where the host's own loss differs; a loss_fn of the user's is told of.
        judge_angle: called with the distance between the directions of the two gradients, where
            the losses agree; 0 where they can't be compared.

    Raises:
        UsageError: the loss is no scalar, or exchanges tensors with other ranks; or what the two
            functions raise.
    """
    loss, gradient = _replay(model, loss_fn, window, params, ranks)
    apart = math.isfinite(trained) and abs(loss - trained) > tolerance * abs(trained) + 1e-6
    if not ranks.any(apart):
        judge_angle(_turned(gradient, params))
    elif loss_fn.given is None:
        refuse(Difference(loss, trained, apart))
    else:
        logger.warning(
            "loss_fn gives %.6g where the Trainer trains on %.6g, %s. Curvature is measured of "
            "loss_fn, and the stability margin is right for that loss only.",
            loss,
            trained,
            SAME,
        )


def _replay(
    model: nn.Module,
    loss_fn: HostLoss,
    window: Sequence[MicroBatch],
    params: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[float, list[Tensor]]:
    """Return the loss of a window, and its gradient by `params`.

    In the precision of training, and not twice differentiable: what comes out must be what training
    itself has computed. The loss is this rank's own, the gradient the mean over ranks, as that in
    `p.grad` is.
    """
    weights, isolates = [loss_fn.weight(micro) for micro in window], loss_fn.isolates()
    loss = 0.0
    gradient = [torch.zeros_like(p) for p in params]
    sharded = is_sharded(params)
    if sharded:
        reshard(list(model.modules()))
    with (
        ranks.together(),
        isolated(
            model,
            params,
            others=[*isolates, *generators_in(model, isolates, list(window))],
            mode="train",
            autocast=True,
            second_order=False,
        ) as snapshot,
        _on_its_own(model, ranks),
    ):
        snapshot.restore()
        for weight, micro in zip(weights, window, strict=True):
            part = weight / sum(weights) * check_loss(loss_fn(model, batches.fresh_copy(micro)))
            loss += float(part.detach())
            found = _through_hosts(part, params) if sharded else _directly(part, params)
            for total, g in zip(gradient, found, strict=True):
                if g is not None:
                    total.add_(g)
    return loss, gradient if sharded else ranks.mean(gradient)


def _turned(gradient: Sequence[Tensor], params: Sequence[Tensor]) -> float:
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
