"""Weight norm and spectral norm, each in torch's older form, by hooks, and in its newer one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from problems import cross_entropy, digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo_case import Case

WIDTHS = ((64, 12), (12, 10))


class WeightNorm(nn.Module):
    """The definition: the weight is g v / ||v||, row by row."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.g = nn.Parameter(torch.ones(fan_out, 1))
        self.v = nn.Parameter(torch.zeros(fan_out, fan_in))

    def forward(self, x: Tensor) -> Tensor:
        length = self.v.square().sum(1, keepdim=True).sqrt()
        return F.linear(x, self.g * self.v / length, self.bias)


class SpectralNorm(nn.Module):
    """The definition: the weight is W / u'Wv, for vectors u and v that stand still.

    Its first evaluation takes them a power iteration nearer to W's first singular vectors, as any
    of torch's does, v before u in the older form and u before v in the newer one.
    """

    def __init__(self, fan_in: int, fan_out: int, *, v_first: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(fan_out))
        self.weight = nn.Parameter(torch.zeros(fan_out, fan_in))
        self.register_buffer("u", torch.zeros(fan_out))
        self.register_buffer("v", torch.zeros(fan_in))
        self.v_first, self.still = v_first, False

    def forward(self, x: Tensor) -> Tensor:
        if not self.still:
            self.iterate(self.weight.detach())
        return F.linear(x, self.weight / (self.u @ self.weight @ self.v), self.bias)

    def iterate(self, weight: Tensor) -> None:
        self.still = True
        if self.v_first:
            self.v = F.normalize(self.u @ weight, dim=0)
        self.u = F.normalize(weight @ self.v, dim=0)
        if not self.v_first:
            self.v = F.normalize(self.u @ weight, dim=0)


def net(layer: Callable[[int, int], nn.Module]) -> nn.Module:
    first, last = (layer(*widths) for widths in WIDTHS)
    return nn.Sequential(first, nn.Tanh(), last)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that the norms by hooks are the older way
        return net(lambda fan_in, fan_out: norm(nn.Linear(fan_in, fan_out)))


def some_digits() -> tuple[Tensor, Tensor]:
    return digits(24)


def case(norm: Any, twin: Callable[[int, int], nn.Module], **options: Any) -> Case:
    return Case(
        functools.partial(normed, norm),
        some_digits,
        cross_entropy,
        twin=functools.partial(net, twin),
        **options,
    )


newer = functools.partial(SpectralNorm, v_first=False)
older = functools.partial(SpectralNorm, v_first=True)

CASES = {
    "weight norm": case(parametrizations.weight_norm, WeightNorm, silent=True),
    "weight norm by hooks": case(nn.utils.weight_norm, WeightNorm, silent=True),
    "spectral norm": case(parametrizations.spectral_norm, newer, still=True),
    "spectral norm by hooks": case(nn.utils.spectral_norm, older, still=True),
}
