"""What a Hugging Face Trainer lets controllers turn while it trains."""

from __future__ import annotations

import math
from typing import Any

from geomwatch.controllers.actuators import BATCH, CLIP, Actuator, Memory
from geomwatch.controllers.resizable import SampledBatches, samplers_of

_FIXED = (
    "A Trainer counts its epochs by the batch and the accumulation it starts with: pass "
    "gradient_accumulation_steps to TrainingArguments, or let get_train_dataloader() draw from a "
    "ResizableBatchSampler"
)


def actuators_of(trainer: Any) -> list[Actuator]:
    """Return the knobs of a Trainer, those that can't be turned with the reason why."""
    loader = trainer.callback_handler.train_dataloader
    batch = SampledBatches(loader) if samplers_of(loader) else Memory(BATCH, obstacle=_FIXED)
    return [TrainerClip(trainer.args), batch]


class TrainerClip(Actuator):
    """Sets `args.max_grad_norm`, which a Trainer reads at every step, before it calls callbacks.

    A norm holds from the next step on, and is never above the Trainer's own.
    """

    def __init__(self, args: Any) -> None:
        super().__init__(CLIP)
        self._args = args
        self._base = args.max_grad_norm

    def set(self, to: float) -> None:
        """Clip at this norm, or at the Trainer's own if that is less; at infinity at its own."""
        super().set(to)
        own = self._base or math.inf  # 0 and None are none
        self._args.max_grad_norm = self._base if own <= to else to

    def close(self) -> None:
        """Give the arguments their own value back."""
        self._args.max_grad_norm = self._base
