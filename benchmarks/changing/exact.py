"""The exact lambda_max and margin of the coming step, from a dense Hessian in float64.

It knows nothing of geomwatch. The margin is that of the step which will be taken: the parameters
that the optimizer holds, at the rate of each, and the gradient that is there, whose projection on
that of the loss is the gain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from changing.net import labels_of


@dataclass(frozen=True, slots=True)
class Exact:
    """What is right at one step."""

    lambda_max: float
    margin: float | None  # None where the optimizer holds nothing that is trained
    gain: float


def exact(model: nn.Module, optimizer: Any, batches: Sequence[Tensor]) -> Exact:
    """Measure before a step, when its gradient is there."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]
    held = {name: p.double() for name, p in model.named_parameters() if not p.requires_grad}

    def loss(flat: Tensor) -> Tensor:
        pairs = zip(named.items(), flat.split(sizes), strict=True)
        values = held | {name: piece.view_as(p) for (name, p), piece in pairs}
        each = [F.cross_entropy(functional_call(model, values, x), labels_of(x)) for x in batches]
        return torch.stack(each).mean()

    flat = torch.cat([p.detach().double().reshape(-1) for p in named.values()])
    hessian = torch.autograd.functional.hessian(loss, flat)
    flat.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(flat), flat)
    taken = torch.cat([_gradient(p) for p in named.values()])
    gain = float(taken @ gradient / (gradient @ gradient))
    root = _root_of_step(optimizer, list(named.values()))
    margin = float(torch.linalg.eigvalsh(root[:, None] * hessian * root)[-1])
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    return Exact(top, gain * margin if bool(root.any()) else None, gain)


def _gradient(p: Tensor) -> Tensor:
    return (torch.zeros_like(p) if p.grad is None else p.grad).double().reshape(-1)


def _root_of_step(optimizer: Any, params: Sequence[Tensor]) -> Tensor:
    """Return sqrt(rate / (threshold P)) of each coordinate, 0 where no step is taken."""
    roots = {id(p): torch.zeros(p.numel(), dtype=torch.float64) for p in params}
    measured = set(roots)
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if id(p) in measured and p.grad is not None]
        if own and "betas" in group:
            conditioned = [_adam(group, optimizer.state.get(p, {}), _gradient(p)) for p in own]
            usual = torch.cat([c[v > 0] for c, v in conditioned]).median()
            keep = 2 - group["lr"] * group["weight_decay"]
            b1 = group["betas"][0]
            factor = group["lr"] * (1 - b1) / (keep * (1 + b1))
            for p, (c, _) in zip(own, conditioned, strict=True):
                roots[id(p)] = (factor / c.maximum(usual)).sqrt()
        elif own:
            factor = group["lr"] / (2 * (1 + group["momentum"]))
            for p in own:
                roots[id(p)] += math.sqrt(factor)
    return torch.cat([roots[id(p)] for p in params])


def _adam(group: Mapping[str, Any], state: Mapping[str, Any], g: Tensor) -> tuple[Tensor, Tensor]:
    b2, count = group["betas"][1], float(state.get("step", 0)) + 1
    before = state["exp_avg_sq"].double().reshape(-1) if state else torch.zeros_like(g)
    v = b2 * before + (1 - b2) * g * g
    return (v / (1 - b2**count)).sqrt() + group["eps"], v
