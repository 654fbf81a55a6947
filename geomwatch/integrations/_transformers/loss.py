"""The loss of a Trainer's optimizer step, computed again: exactly what was trained on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature.objective import LossFn
from geomwatch.integrations._host.loss import HostLoss, MicroBatch, Unknown
from geomwatch.integrations._host.tap import replaced, silence
from geomwatch.integrations._transformers.tap import LossCall, TrainingStep
from geomwatch.isolation.random_state import RandomState
from geomwatch.isolation.reach import captured_by


class Window:
    """The training steps that one optimizer step has summed its gradient over."""

    def __init__(self, steps: Sequence[TrainingStep]) -> None:
        self.steps = list(steps)

    @property
    def loss(self) -> Tensor | float:
        """The loss that is stepped on: a Trainer sums it over micro-batches."""
        total = self.steps[0].loss
        for step in self.steps[1:]:
            total = total + step.loss
        return total

    @cached_property
    def factor(self) -> float:
        """What the window's mean of compute_loss must be multiplied by to give that sum.

        Their number, or 1 where training_step has divided each by that number, as it does for
        losses that it holds for means. Read off the numbers, when a probe asks for it: it costs a
        host sync.
        """
        count = len(self.steps)
        if count == 1:
            return 1.0
        trained = sum(abs(float(step.loss)) for step in self.steps)
        computed = sum(abs(_number(step.call)) for step in self.steps)
        return 1.0 if abs(trained - computed / count) < abs(trained - computed) else float(count)


class StepOfWindow:
    """A training step in its window: what is asked of a call that is to be made again."""

    __slots__ = ("step", "window")

    def __init__(self, step: TrainingStep, window: Window) -> None:
        self.step, self.window = step, window

    @property
    def random(self) -> RandomState | None:
        """The random state before it, if that is kept."""
        return self.step.random


class TrainerLoss(HostLoss):
    """loss_fn(model, batch) on the micro-batches of a Trainer.

    A micro-batch is evaluated by the very call of compute_loss that training has made, with its
    inputs and its keywords. What compute_loss makes of `num_items_in_batch`, the number of labels
    in the window, needs not be known: a piece of a micro-batch gets its share of that number, so
    that the pieces of a sum add up to it and those of a mean average to it. The mean over a window,
    times `Window.factor`, is the loss stepped on.

    Micro-batches count alike, as a Trainer sums over them and averages over ranks (where it counts
    tokens across devices, each rank's loss is its share of their sum already). Those of a loss_fn
    of the user's count by their items, or by what it says itself.
    """

    __slots__ = ("_compute_loss", "_trainer")

    def __init__(self, trainer: Any, given: LossFn | None) -> None:
        super().__init__(given)
        self._trainer, self._compute_loss = trainer, trainer.compute_loss

    def weight(self, batch: Any) -> float:
        """Return what a batch counts for in the mean over a window, and over ranks."""
        if self.given is None or isinstance(batch, Unknown):
            return super().weight(batch)
        weigh: Any = getattr(self.given, "weight", self.weight_of)
        return float(weigh(batch.batch if isinstance(batch, MicroBatch) else batch))

    def micro_batches(self, window: Window) -> list[MicroBatch]:
        """Return the batches of a window as this loss knows them."""
        return [self.micro_batch(step.inputs, StepOfWindow(step, window)) for step in window.steps]

    def evaluate(
        self, model: nn.Module, inputs: Any, call: StepOfWindow | None, share: float
    ) -> Tensor:
        """Return the loss of a micro-batch, of a share of one, or of plain inputs."""
        if self.given is not None:
            with _mute(self._trainer):
                return self.given(model, inputs)
        made = None if call is None else call.step.call
        if call is None or made is None:
            return self._compute(model, inputs, {})
        keywords = dict(made.keywords)
        if share < 1 and keywords.get("num_items_in_batch") is not None:
            keywords["num_items_in_batch"] = share * keywords["num_items_in_batch"]
        return call.window.factor * self._compute(model, inputs, keywords)

    def _compute(self, model: nn.Module, inputs: Any, keywords: dict[str, Any]) -> Tensor:
        with _mute(self._trainer), self._trainer.compute_loss_context_manager():
            returned = self._compute_loss(model, inputs, **keywords)
        loss: Tensor = returned[0] if isinstance(returned, tuple) else returned
        return loss

    def isolates(self) -> list[object]:
        """Return what evaluating the loss may change beside the model.

        The modules that the Trainer holds, and where the user has written the loss the Trainer
        itself and whatever that code carries along.
        """
        modules = [m for m in vars(self._trainer).values() if isinstance(m, nn.Module)]
        parts = [self._compute_loss, getattr(self._trainer, "compute_loss_func", None)]
        if self.given is not None:
            parts = [self.given]
        written = [part for part in parts if part is not None and not _is_the_hosts(part)]
        return [*modules, *(found for part in written for found in captured_by(part))]


@contextlib.contextmanager
def _mute(trainer: Any) -> Iterator[None]:
    """Let nothing that the loss logs through its Trainer be logged again, or ask other ranks.

    Metrics are gathered as if each rank had what this one has. A loss that needs to gather comes
    out otherwise than in training, which is found out before the first probe.
    """
    accelerator, ranks = trainer.accelerator, trainer.accelerator.num_processes
    asks_nobody: dict[str, Any] = {"log": silence}
    if ranks > 1:
        gather = functools.partial(_gather_from_alike, ranks)
        asks_nobody |= {"gather": gather, "gather_for_metrics": gather}
        asks_nobody["reduce"] = functools.partial(_reduce_over_alike, ranks)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(trainer, "log", silence))
        for name, method in asks_nobody.items():
            stack.enter_context(replaced(accelerator, name, method))
        yield


def _gather_from_alike(ranks: int, data: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(data, Tensor):
        return torch.cat([data.reshape(1) if data.ndim == 0 else data] * ranks)
    if isinstance(data, Mapping):
        return {key: _gather_from_alike(ranks, value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(_gather_from_alike(ranks, value) for value in data)
    return data


def _reduce_over_alike(ranks: int, data: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    if isinstance(data, Tensor):
        return scale * data * {"sum": ranks, "mean": 1, "none": 1}[reduction]
    if isinstance(data, Mapping):
        return {k: _reduce_over_alike(ranks, v, reduction, scale) for k, v in data.items()}
    return type(data)(_reduce_over_alike(ranks, v, reduction, scale) for v in data)


def _number(call: LossCall | None) -> float:
    return 0.0 if call is None or call.loss is None else float(call.loss)


def _is_the_hosts(part: Any) -> bool:
    return (getattr(part, "__module__", None) or "").partition(".")[0] == "transformers"
