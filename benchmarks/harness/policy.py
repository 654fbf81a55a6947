"""What stands beside a training: it looks at each step before it is taken, and may change it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from tasks.sources import Batch
from tasks.training import Loop
from torch import Tensor


class Policy(Protocol):
    """Stands beside one training. `uncharged` are seconds spent for the benchmark's own sake."""

    uncharged: float

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Look at a step; act on the gradients that are there, or on the rate of the step."""

    def close(self) -> None:
        """Look back at the last step."""

    def facts(self) -> dict[str, Any]:
        """Return what is worth keeping of it, as plain data."""


Make = Callable[[Loop], Policy]


class StartAgain(Exception):  # noqa: N818 (it is no error)
    """Somebody starts the run again; `make` stands beside the next attempt."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make


class Nothing:
    """Nothing beside the training; and what most baselines need."""

    uncharged = 0.0

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def facts(self) -> dict[str, Any]:
        return {}

    def norm(self) -> float:
        gradients = [p.grad for p in self.loop.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.loop.parameters(), norm)
