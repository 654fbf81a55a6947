"""The net of all these runs, its data, and the batches that a step has seen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geomwatch

TOKENS, CLASSES, ITEMS, LENGTH = 9, 3, 24, 5
STEPS = 36
CHANGE = 17  # the step before which it happens


class Net(nn.Module):
    """A classifier of short texts: 4 embedded numbers a token, averaged, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, 4)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(tokens).mean(1)))
        return self.head(hidden)


def labels_of(tokens: Tensor) -> Tensor:
    """Return what is to be learnt: whether low, middle or high tokens are the most."""
    kinds = F.one_hot(tokens * CLASSES // TOKENS, CLASSES).sum(1)
    return kinds.argmax(1)


def batches(count: int) -> list[Tensor]:
    """Return so many batches of texts, always the same."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(0, TOKENS, (ITEMS, LENGTH), generator=rng) for _ in range(count)]


def loss_fn(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    return F.cross_entropy(model(tokens), labels_of(tokens))


class Tape:
    """The batches that the gradient of the coming step is made of, and all losses so far."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.losses: list[float] = []  # of micro-batches

    def note(self, tokens: Tensor, loss: Tensor) -> None:
        """Add a batch that is trained on."""
        if not geomwatch.is_probing():
            self.batches.append(tokens)
            self.losses.append(float(loss.detach()))

    def clear(self) -> None:
        """Begin another step."""
        self.batches.clear()
