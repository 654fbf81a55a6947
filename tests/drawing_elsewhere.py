"""A generator that a loss of test_outside draws from, in a module of its own."""

from __future__ import annotations

import torch

GENERATOR = torch.Generator()


def noise(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)
