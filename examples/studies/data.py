"""The real images that all three nets read, and the verses for the Transformer."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tasks import data as sources
from torch import Tensor

WORDS, VOCABULARY, VERSES = 32, 1000, 1000  # of a verse, of the language, to train on

Batch = tuple[Tensor, Tensor]  # inputs, targets


@dataclass(frozen=True, eq=False)
class Data:
    """A data set in memory, shuffled, and what of it is held out."""

    name: str
    train: Batch
    held_out: Batch
    classes: int

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """Yield batches for ever, in a new random order at each pass."""
        inputs, targets = self.train
        rng = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(targets), generator=rng).split(size):
                if len(chosen) == size:
                    yield inputs[chosen], targets[chosen]

    def first(self, count: int) -> Batch:
        """Return the same first items to train on."""
        return self.train[0][:count], self.train[1][:count]


@functools.cache
def images(name: str) -> Data:
    """Return "mnist" (28 x 28, 4000 to train on) or "digits" (8 x 8, 1437), as (1, side, side)."""
    if name == "mnist":
        table = sources.mnist()
        return Data("MNIST", table.train, table.held_out, 10)
    (inputs, targets), (held_out, answers) = sources.digits().train, sources.digits().held_out
    square = (-1, 1, 8, 8)
    return Data("digits", (inputs.view(square), targets), (held_out.view(square), answers), 10)


@functools.cache
def verses() -> Data:
    """Verses of the Old (0) and New (1) Testament as 32 words out of 1000; 1000 to train on.

    As many of each class. Word 0 is padding and all that is rare.
    """
    rng = torch.Generator().manual_seed(0)
    chosen: list[tuple[int, list[str]]] = []
    passages = sources.passages()
    order = torch.randperm(len(passages), generator=rng).tolist()
    for testament in (1, 2):
        own = [i for i in order if passages[i][0] == testament][:VERSES]
        chosen += [(testament - 1, re.findall(r"[a-z']+", passages[i][1].lower())) for i in own]
    counts = collections.Counter(word for _, words in chosen for word in words)
    number = {word: i for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 1), 1)}
    tokens = torch.zeros(len(chosen), WORDS, dtype=torch.long)
    for row, (_, words) in zip(tokens, chosen, strict=True):
        known = torch.tensor([number.get(word, 0) for word in words[:WORDS]])
        row[: len(known)] = known
    labels = torch.tensor([label for label, _ in chosen])
    mixed = torch.randperm(len(chosen), generator=rng)
    train, held_out = mixed[:VERSES], mixed[VERSES:]
    return Data("verses", (tokens[train], labels[train]), (tokens[held_out], labels[held_out]), 2)
