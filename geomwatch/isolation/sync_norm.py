"""SyncBatchNorm, which normalises over the batches of all ranks, with a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def is_synchronised(modules: Iterable[nn.Module]) -> bool:
    """Tell whether a loss needs the batches of other ranks for its statistics."""
    return any(isinstance(m, nn.SyncBatchNorm) and _by_batch(m) and m.training for m in modules)


def alone(norm: Any, x: Tensor) -> Tensor:
    """Be the forward of a SyncBatchNorm on this rank's batch, when others evaluate nothing.

    As torch's without other ranks; running statistics are nothing that a probe should move.
    """
    if _by_batch(norm):
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
    )


def shared(share: float) -> Callable[[Any, Tensor], Tensor]:
    """Return the forward of a SyncBatchNorm when all ranks evaluate a batch at the same moment.

    torch's own has no second derivative. This one differentiates, as often as asked, the loss
    L = sum_r share_r L_r of all ranks: a gradient that rank r computes is 1 / share_r times that of
    L through its own activations, so that their mean, weighted by the shares, is that of L. Two
    collectives a layer, and as many in its backward pass.
    """

    def forward(norm: Any, x: Tensor) -> Tensor:
        if not (_by_batch(norm) and norm.training):
            return alone(norm, x)
        return _normalised(norm, x, share, norm.process_group or dist.group.WORLD)

    return forward


def _by_batch(norm: nn.SyncBatchNorm) -> bool:
    return norm.training or norm.running_mean is None


def _normalised(norm: Any, x: Tensor, share: float, group: Any) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, at least in float32."""
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    count = wide.new_full((1,), x.numel() // x.shape[1])
    summed: Any = _Sum.apply
    total = summed(torch.cat([wide.sum(dims), count]), share, group)
    mean, number = total[:-1] / total[-1], total[-1].detach()
    centred = wide - mean.view(shape)
    variance = summed(centred.square().sum(dims), share, group) / number
    out: Tensor = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.weight is not None:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


class _Sum(torch.autograd.Function):
    """y_r = sum_s x_s over ranks.

    dL/dx_r = sum_s dL/dy_s, of which each rank knows 1 / share_s times its own.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, group: Any) -> Tensor:
        ctx.share, ctx.group = share, group
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        summed: Any = _WeightedSum.apply
        return summed(slope, ctx.share, ctx.group), None, None


class _WeightedSum(torch.autograd.Function):
    """y_r = sum_s share_s x_s / share_r, whose own derivative is the plain sum in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, group: Any) -> Tensor:
        ctx.share, ctx.group = share, group
        return _summed(share * x, group) / share

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        summed: Any = _Sum.apply
        return summed(slope, ctx.share, ctx.group), None, None


def _summed(x: Tensor, group: Any) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
