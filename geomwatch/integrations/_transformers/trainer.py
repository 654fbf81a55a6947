"""The Trainer that a callback is in: found, as events don't name it; refused; logged to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from geomwatch.errors import UsageError
from geomwatch.integrations._host.parallelism import check_parallelism
from geomwatch.records import Record
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


def _callbacks(trainer: Any) -> list[Any]:
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", ()))
