"""What a Trainer computes in each step, seen by standing around three of its methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from geomwatch.curvature import batches
from geomwatch.integrations._host.tap import Method, Tap, named
from geomwatch.isolation.random_state import RandomState


class LossCall:
    """A call of compute_loss, kept so that it can be made again with the same outcome."""

    __slots__ = ("inputs", "keywords", "loss", "random")

    def __init__(self, inputs: Any, keywords: Mapping[str, Any]) -> None:
        self.inputs = batches.shell(inputs)  # compute_loss may take the labels out
        self.keywords = dict(keywords)
        self.random = RandomState()
        self.loss: Tensor | None = None  # what it returned


class TrainingStep:
    """What training_step was given for one micro-batch, and what came of it."""

    __slots__ = ("_given", "_random", "calls", "loss")

    def __init__(self, inputs: Any, random: RandomState | None) -> None:
        self._given, self._random = batches.shell(inputs), random
        self.calls: list[LossCall] = []
        self.loss: Tensor | float = 0.0  # that was trained on, as training_step reports it

    @property
    def call(self) -> LossCall | None:
        """The call of compute_loss, if there was exactly one."""
        return self.calls[0] if len(self.calls) == 1 else None

    @property
    def inputs(self) -> Any:
        """The inputs as compute_loss got them, prepared, or else as training_step did."""
        return self._given if self.call is None else self.call.inputs

    @property
    def random(self) -> RandomState | None:
        """The random state before compute_loss, or else before training_step, if that is kept."""
        return self._random if self.call is None else self.call.random


class TrainerTap(Tap):
    """Notes the losses of a Trainer's training steps and the gradient norm before its clipping.

    It stands around `training_step`, `compute_loss` and the accelerator's `clip_grad_norm_`; losses
    computed outside of a training step, as in an evaluation, are left alone. The random state
    before a training_step is kept on request only: to take it down costs 0.1 ms.
    """

    def __init__(self, trainer: Any, *, keeps_random: bool) -> None:
        super().__init__()
        self._keeps_random = keeps_random
        self._steps: list[TrainingStep] = []
        self._norm: Tensor | float | None = None
        self._current: TrainingStep | None = None
        self.stand_around(trainer, "training_step", self._around_step)
        self.stand_around(trainer, "compute_loss", self._around_loss)
        self.stand_around(trainer.accelerator, "clip_grad_norm_", self._around_clip)

    def take(self) -> tuple[list[TrainingStep], Tensor | float | None]:
        """Return the training steps since the last call, and the norm of their gradient."""
        steps, norm = self._steps, self._norm
        self._steps, self._norm = [], None
        return steps, norm

    def _around_step(self, original: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = named(("model", "inputs", "num_items_in_batch"), args, kwargs)
        random = RandomState() if self._keeps_random else None
        step = self._current = TrainingStep(given.get("inputs"), random)
        try:
            step.loss = original(*args, **kwargs)
        finally:
            self._current = None
        if self.is_open:
            self._steps.append(step)
        return step.loss

    def _around_loss(self, original: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if self._current is None:
            return original(*args, **kwargs)
        names = ("model", "inputs", "return_outputs", "num_items_in_batch")
        given = named(names, args, kwargs)
        keywords = {k: v for k, v in given.items() if k not in ("model", "inputs")}
        call = LossCall(given["inputs"], keywords)
        self._current.calls.append(call)
        returned = original(*args, **kwargs)
        loss = returned[0] if isinstance(returned, tuple) else returned
        call.loss = loss.detach() if isinstance(loss, Tensor) else None
        return returned

    def _around_clip(self, original: Method, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._norm = original(*args, **kwargs)
        return self._norm
