"""What a loop on accelerate lets controllers turn; clipping is done in the optimizer's own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geomwatch.controllers.actuators import BATCH, Actuator, Memory
from geomwatch.controllers.resizable import SampledBatches, Windows, samplers_of

_SPLIT = (
    "With split_batches=True the shards of a batch are cut to one size when an epoch begins: use "
    "DataLoaderConfiguration(split_batches=False)"
)


def actuators_of(accelerator: Any) -> list[Actuator]:
    """Return the batch size of a loop: through its sampler, or else through its accumulation."""
    for loader in accelerator._dataloaders:
        if samplers_of(loader):
            if accelerator.split_batches:
                return [Memory(BATCH, obstacle=_SPLIT)]
            return [SampledBatches(loader)]
    return [LoopAccumulation(accelerator)]


class LoopAccumulation(Windows):
    """Sets `accelerator.gradient_accumulation_steps` at the end of a window of either length.

    Only loops in `with accelerator.accumulate(model):` look at it, and only in those does the
    accelerator count micro-batches: until it has counted one, nothing is changed.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.gradient_accumulation_steps)
        self._accelerator = accelerator
        self._counts = False

    @property
    def obstacle(self) -> str:
        """Why this loop can't change it."""
        self._counts |= self._accelerator.step > 0  # which begins anew with each epoch
        if self._counts:
            return ""
        return "This loop does not accumulate: put its body into accelerator.accumulate(model)"

    def value(self, rates: Sequence[float]) -> float:
        """Return the multiple that is in force."""
        return float(self._accelerator.gradient_accumulation_steps / self._base)

    def refresh(self) -> None:
        """Make the change before the step of a window that ends where one of the new ones does."""
        counted, present = self._accelerator.step, self._accelerator.gradient_accumulation_steps
        if present != self.wanted and counted > 0 and counted % self.wanted == 0:
            self._accelerator.gradient_accumulation_steps = self.wanted

    def close(self) -> None:
        """Give the accelerator its own number back."""
        self._accelerator.gradient_accumulation_steps = self._base
