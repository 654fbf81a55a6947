"""The optimizers that tasks are trained with, each by a name and at a rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer


class Lion(Optimizer):
    """The sign of a momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move each weight by the rate."""
        for group in self.param_groups:
            now, later = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    momentum: Tensor = state.setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(group["lr"] * momentum.lerp(p.grad, 1 - now).sign())
                    momentum.lerp_(p.grad, 1 - later)


class Muon(Optimizer):
    """torch's Muon on matrices and AdamW on all else, as it is used; one rate for both."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        parts: list[list[nn.Parameter]] = [[], []]
        for p in params:
            parts[p.ndim != 2].append(p)
        super().__init__([p for part in parts for p in part], {"lr": lr})
        muon = partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        made = zip((muon, torch.optim.AdamW), parts, strict=True)
        self._parts: list[Optimizer] = [make(part, lr=lr) for make, part in made if part]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    def step(self, closure: Any = None) -> None:
        """Let each take its own."""
        for part in self._parts:
            part.step()


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "gd": SGD,  # of full batches
    "sgd0": SGD,
    "sgd50": partial(SGD, momentum=0.5),
    "sgd": partial(SGD, momentum=0.9),
    "sgd95": partial(SGD, momentum=0.95),
    "nesterov": partial(SGD, momentum=0.9, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "lion": Lion,
}
FAMILIES = {
    "momentum": ("gd", "sgd0", "sgd50", "sgd", "sgd95", "nesterov"),
    "adaptive": ("adam", "adamw", "rmsprop", "adagrad", "nadam"),
    "direction": ("lion", "muon"),  # steps of a constant size
}
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    OPTIMIZERS["muon"] = Muon
