"""The Trainer that a callback is in: found, or refused; and what it lets controllers turn."""

from __future__ import annotations

import inspect
from typing import Any

from geomwatch.controllers.actuators import BATCH, Actuator, Memory
from geomwatch.controllers.resizable import SampledBatches, samplers_of
from geomwatch.errors import UsageError
from geomwatch.integrations._host.actuators import HostClip
from geomwatch.integrations._host.parallelism import check_parallelism

_FIXED = (
    "A Trainer counts its epochs by the batch and the accumulation it starts with: pass "
    "gradient_accumulation_steps to TrainingArguments, or let get_train_dataloader() draw from a "
    "ResizableBatchSampler"
)


def find_trainer(kind: type[Any], callback: object) -> Any:
    """Return the Trainer whose event is being handled by `callback`; None if it can't be found.

    Events pass no Trainer. It is the `self` of a frame further up, and holds the callback.
    """
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind) and holds(owner, callback):
            return owner
        frame = frame.f_back
    return None


def holds(trainer: Any, callback: object) -> bool:
    """Tell whether a Trainer calls this very callback."""
    return any(held is callback for held in callbacks_of(trainer))


def trained_model(trainer: Any) -> Any:
    """Return the model, as it is wrapped where there are several processes."""
    return trainer.model_wrapped if trainer.accelerator.num_processes > 1 else trainer.model


def refuse_unknown_gradients(trainer: Any) -> None:
    """Refuse what leaves less in `p.grad` than the gradient that is averaged over all processes.

    Raises:
        UsageError: curvature would be that of a part of the batch or of the model.
    """
    if trainer.args.n_gpu > 1:
        raise UsageError(
            f"GeomwatchCallback must have one device in a process, got {trainer.args.n_gpu}. Start "
            "one process for each with torchrun, or hide all but one with CUDA_VISIBLE_DEVICES."
        )
    check_parallelism(trainer.accelerator, trained_model(trainer), "GeomwatchCallback")


def callbacks_of(trainer: Any) -> list[Any]:
    """Return what a Trainer calls at its events."""
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))


def actuators_of(trainer: Any) -> list[Actuator]:
    """Return the knobs of a Trainer, those that can't be turned with the reason why."""
    loader = trainer.callback_handler.train_dataloader
    batch = SampledBatches(loader) if samplers_of(loader) else Memory(BATCH, obstacle=_FIXED)
    return [HostClip(trainer.args, "max_grad_norm"), batch]
