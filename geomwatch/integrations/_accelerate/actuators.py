"""What a loop on accelerate lets controllers turn; clipping is done in the optimizer's own step."""

from __future__ import annotations

from typing import Any

from geomwatch.controllers.actuators import BATCH, Actuator, Memory
from geomwatch.controllers.resizable import SampledBatches, samplers_of
from geomwatch.integrations._host.actuators import HostAccumulation

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


class LoopAccumulation(HostAccumulation):
    """Sets `accelerator.gradient_accumulation_steps` before the step that a window ends with.

    Only loops in `with accelerator.accumulate(model):` look at it, and only in those does the
    accelerator count micro-batches: until it has counted one, nothing is changed.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator, "gradient_accumulation_steps")
        self._accelerator = accelerator
        self._counts = False

    @property
    def obstacle(self) -> str:
        """Why this loop can't change it."""
        self._counts |= self._accelerator.step > 0  # which begins anew with each epoch
        if self._counts:
            return ""
        return "This loop does not accumulate: put its body into accelerator.accumulate(model)"

    def refresh(self) -> None:
        """Make the change, if both windows end with this micro-batch."""
        self.counted(self._accelerator.step)
