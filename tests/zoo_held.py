"""Losses part of which is held constant for their gradient, so that its Jacobian has no spectrum.

Double backward is the Hessian with that part held, differences of gradients are not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import zoo_transformers
from problems import digits
from torch import Tensor, nn
from zoo_case import Case


class SelfSupervised(nn.Module):
    """SimSiam: each view predicts the other, without a gradient through what it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 8))
        self.predict = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.encode(x), self.encode(x.flip(1))
        return -sum(
            F.cosine_similarity(self.predict(a), b.detach()).mean()
            for a, b in [(one, two), (two, one)]
        )


class Quantized(nn.Module):
    """A VQ-VAE: the nearest code stands for the encoder's output, which gets its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 4)
        self.codes = nn.Parameter(torch.randn(16, 4))
        self.decode = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        code = self.codes[(z[:, None] - self.codes).square().sum(-1).argmin(1)]
        loss = F.mse_loss(code, z.detach()) + 0.25 * F.mse_loss(z, code.detach())
        return loss + F.mse_loss(self.decode(z + (code - z).detach()), x)


class Values(nn.Module):
    """Q-learning without a target network."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        taken = self.q(x)[:, 0]
        target = 1 + 0.9 * self.q(x.roll(1, 0)).max(1).values.detach()
        return F.mse_loss(taken, target)


def dora() -> nn.Module:
    """LoRA with the norms of its columns held, as its paper has it."""
    return zoo_transformers.lora(
        zoo_transformers.llama, ["q_proj", "v_proj"], use_dora=True, init_lora_weights=False
    )


def of_inputs(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def some_digits() -> tuple[Tensor, Tensor]:
    return digits(24)


HELD: dict[str, Any] = {"held": True, "validation": "part of the loss is held constant"}


def case(make: Callable[[], nn.Module]) -> Case:
    return Case(make, some_digits, of_inputs, **HELD)


CASES = {
    "stop-gradient": case(SelfSupervised),
    "straight-through estimator": case(Quantized),
    "Q-learning": case(Values),
    "DoRA on Llama": zoo_transformers.case(dora, zoo_transformers.text, **HELD),
}
