"""Functions whose second derivative autograd gets wrong without a word, or does not take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RawContext(torch.autograd.Function):
    """tanh whose backward uses a tensor kept on ctx: autograd takes it for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = torch.tanh(x)
        return ctx.y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.y.detach() ** 2)


class OnceDifferentiable(RawContext):
    """The same, but it says so."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.y**2)


class IntoBuffer(RawContext):
    """The same, computed into a buffer: torch refuses to follow, in words of its own."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.mul(gradient, 1 - ctx.y.detach() ** 2, out=torch.empty_like(gradient))
