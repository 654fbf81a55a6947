"""The Trainer that a callback is in: found, as events don't name it; refused; asked to stop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from geomwatch.errors import UsageError
from geomwatch.integrations._critical import is_worth_saving, tell_of_stop
from geomwatch.records import Alert, Record
from geomwatch.sinks import logger


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
    return any(held is callback for held in _callbacks(trainer))


def refuse_several(trainer: Any, kind: type[Any]) -> None:
    """Refuse a second callback, or the same one twice.

    Raises:
        UsageError: there are several.
    """
    count = sum(isinstance(held, kind) for held in _callbacks(trainer))
    if count > 1:
        raise UsageError(
            f"{type(trainer).__name__} must have one GeomwatchCallback, got {count}. Both would "
            "measure and log the same; leave one out."
        )


def refuse_processes(trainer: Any) -> None:
    """Refuse what is not one process that holds the whole model on one device.

    Raises:
        UsageError: curvature would be that of a part of the batch or of the model.
    """
    processes, devices = trainer.accelerator.num_processes, trainer.args.n_gpu
    kind = str(getattr(trainer.accelerator.distributed_type, "value", "NO"))
    if processes > 1 or devices > 1 or kind != "NO":
        raise UsageError(
            "GeomwatchCallback must run in one process on one device, got "
            f"{processes} processes with {max(devices, 1)} devices each, distributed type {kind}. "
            "Start Python without torchrun, and hide all GPUs but one with CUDA_VISIBLE_DEVICES."
        )


def publish(log: Callable[[Any, Any], None], trainer: Any, record: Record, prefix: str) -> None:
    """Log a record as the Trainer logs its losses, to `log_history` and all trackers."""
    try:
        log(trainer, record.scalars(prefix))
    except Exception as error:  # a tracker that is out of reach, say
        logger.warning(
            "the record of step %d did not reach all trackers: %s: %s",
            record.step,
            type(error).__name__,
            error,
        )


def ask_for(action: str | None, alerts: Sequence[Alert], step: int, control: Any) -> None:
    """Set a Trainer's control flags after critical alerts: "save", "stop" or None."""
    rules = {alert.rule for alert in alerts if alert.severity == "critical"}
    if not rules or action is None:
        return
    if action == "stop":
        control.should_training_stop = True
        tell_of_stop(step)
    elif is_worth_saving(rules, step):
        control.should_save = True


def _callbacks(trainer: Any) -> list[Any]:
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))
