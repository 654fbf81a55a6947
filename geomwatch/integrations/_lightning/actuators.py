"""What a Trainer of Lightning lets controllers turn while it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from geomwatch.controllers.actuators import BATCH, CLIP, Actuator, Memory
from geomwatch.controllers.resizable import SampledBatches, Windows, samplers_of


def actuators_of(trainer: Any, module: Any, optimizer: Any) -> list[Actuator]:
    """Return the knobs of a Trainer, those that can't be turned with the reason why."""
    return [_clip(trainer, module, optimizer), _batch(trainer, module)]


class TrainerClip(Actuator):
    """Sets `trainer.gradient_clip_val`, which Lightning reads at every step.

    Never above the Trainer's own. Probes come after clipping, so that a norm holds from the next
    step on.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(CLIP)
        self._trainer = trainer
        self._base = trainer.gradient_clip_val

    def set(self, to: float) -> None:
        """Clip at this norm, or at the Trainer's own if that is less; at infinity at its own."""
        super().set(to)
        own = self._base or math.inf  # 0 and None are none
        self._trainer.gradient_clip_val = self._base if own <= to else to

    def close(self) -> None:
        """Give the Trainer its own value back."""
        self._trainer.gradient_clip_val = self._base


class TrainerAccumulation(Windows):
    """Sets `trainer.accumulate_grad_batches` at the end of a window that both lengths end at.

    At any other moment a window would be stepped with that is too short, or never zeroed.
    """

    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.accumulate_grad_batches)
        self._trainer = trainer

    def value(self, rates: Sequence[float]) -> float:
        """Return the multiple that is in force."""
        return float(self._trainer.accumulate_grad_batches / self._base)

    def batch_ends(self, index: int) -> None:
        """Make the change, if this batch ends a window of either length."""
        present = self._trainer.accumulate_grad_batches
        if present != self.wanted and not (index + 1) % present and not (index + 1) % self.wanted:
            self._trainer.accumulate_grad_batches = self.wanted

    def close(self) -> None:
        """Give the Trainer its own number back."""
        self._trainer.accumulate_grad_batches = self._base


def _clip(trainer: Any, module: Any, optimizer: Any) -> Actuator:
    """Return the clip, or why there is none."""
    if not module.automatic_optimization:
        return Memory(
            CLIP, obstacle="Under manual optimisation gradients are clipped by the module"
        )
    own = type(module).configure_gradient_clipping.__module__.split(".")[0]
    if own not in ("lightning", "pytorch_lightning"):
        return Memory(CLIP, obstacle="The module's own configure_gradient_clipping() does it")
    algorithm = trainer.gradient_clip_algorithm
    if getattr(algorithm, "value", algorithm) == "value":
        return Memory(CLIP, obstacle='This Trainer clips by value: gradient_clip_algorithm="norm"')
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        return Memory(
            CLIP, obstacle="Lightning can't clip for a fused optimizer under a GradScaler"
        )
    return TrainerClip(trainer)


def _batch(trainer: Any, module: Any) -> Actuator:
    """Return what sets the size of a step, or why there is nothing."""
    for loader in _loaders(trainer.train_dataloader):
        if samplers_of(loader):
            return SampledBatches(loader)
    if not module.automatic_optimization:
        return Memory(BATCH, obstacle="Under manual optimisation the module accumulates gradients")
    names = [type(callback).__name__ for callback in trainer.callbacks]
    if "GradientAccumulationScheduler" in names:
        return Memory(BATCH, obstacle="A GradientAccumulationScheduler sets the accumulation")
    return TrainerAccumulation(trainer)


def _loaders(loaders: Any) -> Iterator[Any]:
    """Yield the loaders of a collection that a module may have returned."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _loaders(loader)
    else:
        yield loaders
