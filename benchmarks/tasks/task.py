"""A task: a net, its loss and its data, for any benchmark that trains many of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.sources import Batch, Source

_PIECE = 256  # items evaluated at a time
_TRAIN = 512  # items that the training loss is read on

Family = Literal["mlp", "batch norm", "attention", "recurrent"]


@dataclass(frozen=True)
class Evaluation:
    """How good a model is: mean loss and share of right answers on held-out data."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """What to train: `build(seed)`, `loss_fn(model, batch)` and `batches(seed, size)`.

    `steps` make a run of a few seconds to half a minute on one core at the batch size `batch`.
    """

    name: str
    family: Family
    net: Callable[[], nn.Module]
    source: Source
    classes: int
    steps: int
    batch: int = 64
    squared_error: bool = False  # instead of cross-entropy

    def build(self, seed: int) -> nn.Module:
        """Return a new model; the global generators are left as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.net()

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the items (and characters) of a batch."""
        inputs, targets = batch
        return self._criterion(model(inputs), targets)

    def batches(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever; `size` None is full-batch: the same items at each step."""
        return self.source.draws(seed, size)

    def items(self, size: int | None) -> int:
        """Return how many items a batch of that size holds."""
        return self.source.full if size is None else size

    def chance(self) -> float:
        """Return the loss of the best constant answer: that of a net that has learnt nothing.

        The entropy of the labels in nats; for the squared error their summed variance.
        """
        targets = self.source.train(4096)[1].reshape(-1)
        share = torch.bincount(targets, minlength=self.classes).double() / len(targets)
        if self.squared_error:
            return float((share * (1 - share)).sum())
        return float(-(share * share.clamp_min(1e-12).log()).sum())

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluate on the held-out data in eval mode; the model comes back in its own mode."""
        was_training = model.training
        model.eval()
        losses, right, total = 0.0, 0, 0
        with torch.no_grad():
            for inputs, targets in _pieces(self.source.held_out()):
                logits = model(inputs)
                losses += float(self._criterion(logits, targets)) * targets.numel()
                right += int((logits.argmax(-1) == targets).sum())
                total += targets.numel()
        model.train(was_training)
        return Evaluation(losses / total, right / total)

    def train_loss(self, model: nn.Module) -> float:
        """Return the loss on 512 fixed training items, in train mode on a copy of the model."""
        replica = copy.deepcopy(model).train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            parts = [
                (float(self.loss_fn(replica, piece)), len(piece[1]))
                for piece in _pieces(self.source.train(_TRAIN))
            ]
        return math.fsum(loss * n for loss, n in parts) / sum(n for _, n in parts)

    def _criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits, targets = logits.reshape(-1, self.classes), targets.reshape(-1)
        if self.squared_error:
            wanted = F.one_hot(targets, self.classes).to(logits.dtype)
            return self.classes * F.mse_loss(logits, wanted)
        return F.cross_entropy(logits, targets)


def _pieces(batch: Batch) -> Iterator[Batch]:
    inputs, targets = batch
    for start in range(0, len(targets), _PIECE):
        part = slice(start, start + _PIECE)
        if isinstance(inputs, tuple):
            yield tuple(column[part] for column in inputs), targets[part]
        else:
            yield inputs[part], targets[part]
