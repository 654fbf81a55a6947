"""What a Trainer of Lightning lets controllers turn while it fits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from geomwatch.controllers.actuators import BATCH, CLIP, Actuator, Memory
from geomwatch.controllers.resizable import SampledBatches, samplers_of
from geomwatch.integrations._host.actuators import HostAccumulation, HostClip


def actuators_of(trainer: Any, module: Any, optimizer: Any) -> list[Actuator]:
    """Return the knobs of a Trainer, those that can't be turned with the reason why."""
    return [_clip(trainer, module, optimizer), _batch(trainer, module)]


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
    return HostClip(trainer, "gradient_clip_val")


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
    return HostAccumulation(trainer, "accumulate_grad_batches")


def _loaders(loaders: Any) -> Iterator[Any]:
    """Yield the loaders of a collection that a module may have returned."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        for loader in loaders:
            yield from _loaders(loader)
    else:
        yield loaders
