"""Endless batches out of a data set, the same for the same seed, whatever else draws numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks.data import Table

Batch = Any  # of supervised tasks (inputs, targets)


class Source(Protocol):
    """Where a task takes its batches from; `full` items are its full batch."""

    @property
    def full(self) -> int: ...

    def draws(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever; `size` None is all of the (small) training set each time."""

    def train(self, count: int) -> Batch:
        """Return the same first `count` items to train on."""

    def held_out(self) -> Batch:
        """Return what is never trained on."""


@dataclass(frozen=True)
class Items:
    """Labelled items, in a new random order at each pass; the last columns are the labels.

    Without a size each batch is the first `full` items: a data set small enough for full-batch
    gradient descent.
    """

    table: Callable[[], Table]
    full: int = 512

    def draws(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever."""
        if size is None:
            while True:
                yield self.train(self.full)
        columns = self.table().train
        rng = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(columns[0]), generator=rng).split(size):
                if len(chosen) == size:
                    yield _batch(tuple(column[chosen] for column in columns))

    def train(self, count: int) -> Batch:
        """Return the same first items to train on."""
        return _batch(tuple(column[:count] for column in self.table().train))

    def held_out(self) -> Batch:
        """Return all that is never trained on."""
        return _batch(self.table().held_out)


@dataclass(frozen=True)
class Text:
    """Windows of a text as (characters, the next characters), from random places.

    The last twentieth is held out.
    """

    characters: Callable[[], tuple[Tensor, int]]
    context: int
    full: int = 64

    def draws(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever."""
        if size is None:
            while True:
                yield self.train(self.full)
        text = self._part(0.0, 0.95)
        rng = torch.Generator().manual_seed(seed)
        while True:
            places = torch.randint(0, len(text) - self.context, (size,), generator=rng)
            yield self._windows(text, places)

    def train(self, count: int) -> Batch:
        """Return `count` windows spread over the part to train on."""
        text = self._part(0.0, 0.95)
        return self._windows(text, torch.linspace(0, len(text) - self.context - 1, count).long())

    def held_out(self) -> Batch:
        """Return 256 windows spread over the held-out part."""
        text = self._part(0.95, 1.0)
        return self._windows(text, torch.linspace(0, len(text) - self.context - 1, 256).long())

    def _part(self, start: float, stop: float) -> Tensor:
        text, _ = self.characters()
        return text[int(start * len(text)) : int(stop * len(text))]

    def _windows(self, text: Tensor, places: Tensor) -> Batch:
        windows = text[places[:, None] + torch.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]


@dataclass(frozen=True)
class Drawn:
    """Batches made up as they are needed, by `draw(generator, size)`."""

    draw: Callable[[torch.Generator, int], Batch]
    full: int = 256

    def draws(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever."""
        rng = torch.Generator().manual_seed(seed)
        while True:
            yield self.train(self.full) if size is None else self.draw(rng, size)

    def train(self, count: int) -> Batch:
        """Return the same `count` items."""
        return self.draw(torch.Generator().manual_seed(2**31), count)

    def held_out(self) -> Batch:
        """Return 1,000 others."""
        return self.draw(torch.Generator().manual_seed(2**31 + 1), 1000)


def _batch(columns: tuple[Tensor, ...]) -> Batch:
    *inputs, targets = columns
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), targets
