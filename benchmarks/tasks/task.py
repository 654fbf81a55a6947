"""A task: a model, its loss and its data, for any benchmark that trains many of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.sources import Batch, Source

Kind = Literal[
    "classification",
    "regression",
    "language model",
    "sequence to sequence",
    "fine-tuning",
    "variational autoencoder",
    "diffusion",
    "adversarial",
    "contrastive",
    "policy gradient",
    "value learning",
    "physics-informed",
    "sets",
    "graphs",
    "mixture of experts",
    "several tasks",
]
Loss = Callable[[nn.Module, Batch], Tensor]
KINDS: tuple[str, ...] = get_args(Kind)
EVERY = 10  # steps between two scores of a task whose loss does not tell how good a model is
_PIECE = 256  # items evaluated at a time
_NEW = (1000, 1001, 1002)  # seeds of models that have learnt nothing


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on held-out data: mean loss, and share of right answers if there are."""

    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class Task:
    """What to train: `build(seed)`, `loss_fn(model, batch)` and `batches(seed, size)`.

    `steps` make a run of a few seconds to half a minute on one core at the batch size `batch`.

    Args:
        net: makes a new model.
        source: where batches come from.
        loss: of a model on a batch; the scalar that is trained on.
        nothing: the loss (or score) of a model that has learnt nothing; that of new models if None.
        score: how bad a model is, where the loss does not tell: an adversary's or a policy's. Draws
            nothing from the global generators.
        collect: makes the batch to train on out of a drawn one, by the model itself: roll-outs,
            bootstrapped targets; or trains the model's adversary meanwhile.
        trained: the part of a model that the optimizer gets.
    """

    name: str
    kind: Kind
    net: Callable[[], nn.Module]
    source: Source
    loss: Loss
    steps: int = 300
    batch: int = 32
    nothing: float | None = None
    score: Callable[[nn.Module], float] | None = None
    collect: Callable[[nn.Module, Batch], Batch] | None = None
    trained: Callable[[nn.Module], nn.Module] | None = None

    def build(self, seed: int) -> nn.Module:
        """Return a new model; the global generators are left as they were."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.net()

    def parameters(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return what the optimizer gets."""
        return (self.trained(model) if self.trained else model).parameters()

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(model, batch)

    def batches(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever; `size` None is full-batch: the same items at each step."""
        return self.source.draws(seed, size)

    def items(self, size: int | None) -> int:
        """Return how many items a batch of that size holds."""
        return self.source.full if size is None else size

    def chance(self) -> float:
        """Return the loss (or score) of a model that has learnt nothing."""
        if self.nothing is not None:
            return self.nothing
        judge = self.score or self._first_loss
        return statistics.median(judge(self.build(seed)) for seed in _NEW)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluate on the held-out data in eval mode; the model comes back in its own mode."""
        if self.score is not None:
            return Evaluation(self.score(model))
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            loss = self.loss_fn(model, self.source.held_out()).item()
        model.train(was_training)
        return Evaluation(loss)

    def _first_loss(self, model: nn.Module) -> float:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.loss_fn(model, self.source.train(_PIECE)).item()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean over the items (and places) of a batch, in nats."""
    inputs, targets = batch
    logits = model(inputs)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Return the squared distance of the outputs to one-hot labels, mean over items."""
    inputs, targets = batch
    outputs = model(inputs)
    wanted = F.one_hot(targets, outputs.shape[-1]).to(outputs.dtype)
    return outputs.shape[-1] * F.mse_loss(outputs, wanted)


@dataclass(frozen=True)
class Classification(Task):
    """Labels of items, or of each place of a sequence."""

    loss: Loss = cross_entropy
    classes: int = 10

    def chance(self) -> float:
        """Return the loss of the best constant answer: that of a net that has learnt nothing.

        The entropy of the labels in nats; for the squared error their summed variance.
        """
        if self.nothing is not None:
            return self.nothing
        targets = self.source.train(4096)[1].reshape(-1)
        share = torch.bincount(targets, minlength=self.classes).double() / len(targets)
        if self.loss is squared_error:
            return float((share * (1 - share)).sum())
        return float(-(share * share.clamp_min(1e-12).log()).sum())

    def evaluate(self, model: nn.Module) -> Evaluation:
        """Evaluate on the held-out data in eval mode; the model comes back in its own mode."""
        was_training = model.training
        model.eval()
        losses, right, total = 0.0, 0, 0
        with torch.no_grad():
            for piece in _pieces(self.source.held_out()):
                inputs, targets = piece
                losses += float(self.loss_fn(model, piece)) * targets.numel()
                right += int((model(inputs).argmax(-1) == targets).sum())
                total += targets.numel()
        model.train(was_training)
        return Evaluation(losses / total, right / total)


def _pieces(batch: Batch) -> Iterator[Batch]:
    inputs, targets = batch
    for start in range(0, len(targets), _PIECE):
        part = slice(start, start + _PIECE)
        if isinstance(inputs, tuple):
            yield tuple(column[part] for column in inputs), targets[part]
        else:
            yield inputs[part], targets[part]
