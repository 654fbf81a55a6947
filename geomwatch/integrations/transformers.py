"""geomwatch in a Hugging Face Trainer: Trainer(..., callbacks=[GeomwatchCallback(every=100)])."""

from __future__ import annotations

import logging
import weakref
from typing import Any, Literal

from typing_extensions import Unpack

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.integrations._host.critical import wanted
from geomwatch.integrations._host.early import check_early
from geomwatch.integrations._host.json_state import is_json
from geomwatch.integrations._transformers.trainer import (
    find_trainer,
    holds,
    publish,
    refuse_several,
    refuse_unknown_gradients,
)
from geomwatch.integrations._transformers.watch import Watch
from geomwatch.integrations.extras import missing
from geomwatch.monitoring.monitor import Monitor
from geomwatch.monitoring.options import Options, is_disabled
from geomwatch.records import Record
from geomwatch.sinks import logger

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise missing("transformers", "transformers") from error

_USERS_OWN = "_geomwatch_callback"  # where a Trainer keeps the callback that the user has made


class GeomwatchCallback(TrainerCallback, ExportableState):
    """Watches the geometry of the loss that a Trainer trains on, and warns before it goes wrong.

    Nothing else needs to be done. A probe is logged like the Trainer's own losses, to all its
    trackers and to `log_history`, and training stays bit-identical. What is measured is the loss
    that compute_loss returned in training, whatever computes it there; at the first step it is
    computed again, with its gradient, and compared.

    Args:
        prefix: in front of the names of quantities in the logs.
        on_critical: at a critical alert "save" a checkpoint, or "stop" the training.
        loss_fn: (model, inputs) -> the loss of a micro-batch, where training_step does not get it
            from one call of compute_loss. The inputs are those of compute_loss, or else those of
            training_step; micro-batches count by their items or by `loss_fn.weight(inputs)`.
        **options: those of `Monitor`.

    Raises:
        UsageError: (a ValueError) an option can't work; at construction, when training begins, or
            at its first step.
    """

    def __init__(
        self,
        *,
        prefix: str = "geom/",
        on_critical: Literal["save", "stop"] | None = None,
        loss_fn: LossFn | None = None,
        **options: Unpack[Options],
    ) -> None:
        if on_critical not in (None, "save", "stop"):
            raise UsageError(f'on_critical must be "save", "stop" or None, got {on_critical!r}.')
        if not isinstance(prefix, str):
            raise UsageTypeError(f"prefix must be a string, got {type(prefix).__name__}.")
        check_early("GeomwatchCallback", options, loss_fn)
        self._options: Any = {**options}
        self._prefix, self._on_critical, self._loss_fn = prefix, on_critical, loss_fn
        self._trainer: weakref.ref[Any] | None = None
        self._heir: GeomwatchCallback | None = None  # that the Trainer has put in its place
        self._watch: Watch | None = None
        self._record: Record | None = None  # to be logged once the step is taken
        self._told = False
        # What a Trainer sets in the new callback that it makes from a checkpoint.
        self.saved_state: Any = None  # of the monitor
        self.left_out: list[str] | None = None  # options that the checkpoint could not hold

    @property
    def monitor(self) -> Monitor | None:
        """The Monitor of the training that runs, or of the last one; None before the first."""
        watch = (self._heir or self)._watch
        return None if watch is None else watch.monitor

    def attach(self, trainer: Trainer) -> None:
        """Name the Trainer, where it is not found by itself.

        Raises:
            UsageError: it is no Trainer, or this callback belongs to another one.
        """
        if not isinstance(trainer, Trainer):
            raise UsageTypeError(
                f"trainer must be a transformers.Trainer, got {type(trainer).__name__}."
            )
        if not holds(trainer, self):
            trainer.add_callback(self)
        self._belong_to(trainer)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Get to know the Trainer."""
        trainer = find_trainer(Trainer, self)
        if trainer is not None:
            self._belong_to(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to watch, from the state that a checkpoint holds if training resumes from one."""
        saved = None
        if state.global_step > 0:
            stored = state.stateful_callbacks.get(type(self).__name__, {})
            stored = stored[0] if isinstance(stored, list) else stored
            saved = self.saved_state = stored.get("attributes", {}).get("saved_state")
        self._begin(state, kwargs["optimizer"], saved)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Join in, where the callback has been added to a training under way."""
        if self._watching is None and not is_disabled():
            logger.warning(
                "GeomwatchCallback was added after training had begun: it watches from step %d on.",
                state.global_step,
            )
            self._begin(state, kwargs["optimizer"], None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe, if it is due: the gradient is complete, and the step not yet taken."""
        if self._watching is not None:
            self._record = self._watching.step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a probe; `global_step` is still the number of steps taken before this one."""
        record, self._record = self._record, None
        if record is not None:
            wanted = control.should_log
            # Not the log() of a subclass: some empty their averages in it, or look for a "loss".
            publish(Trainer.log, self._known_trainer(), record, self._prefix)
            control.should_log = wanted  # which log() takes for done

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save or stop after a critical alert."""
        if self._watching is None:
            return
        alerts, ranks = self._watching.new_alerts(), self._watching.ranks
        action = wanted(self._on_critical, alerts, ranks, state.global_step)
        control.should_save |= action == "save"
        control.should_training_stop |= action == "stop"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the Trainer as it was."""
        if self._watching is not None:
            self._watching.close()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell that nothing is measured, where there has been no training."""
        if self._told or self._watch is not None or is_disabled():
            return
        self._told = True
        may_train = getattr(find_trainer(Trainer, self), "train_dataset", None) is not None
        logger.log(
            logging.INFO if may_train else logging.WARNING,
            "GeomwatchCallback measures while trainer.train() runs; in an evaluation alone there "
            "is nothing to measure. Leave it out of a Trainer that only evaluates.",
        )

    def on_predict(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell that nothing is measured, where there has been no training."""
        self.on_evaluate(args, state, control)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the options that JSON can hold, and the monitor's state.

        A Trainer gives it back only with `restore_callback_states_from_checkpoint`; without, it is
        read from `TrainerState.stateful_callbacks` when training resumes.
        """
        options = {"prefix": self._prefix, "on_critical": self._on_critical, **self._options}
        if self._watching is not None:
            self.saved_state = self._watching.state()
        return {
            "args": {name: value for name, value in options.items() if is_json(value)},
            "attributes": {"saved_state": self.saved_state, "left_out": list(self._not_json())},
        }

    @property
    def _watching(self) -> Watch | None:
        return self._watch if self._watch is not None and self._watch.is_open else None

    def _begin(self, state: Any, optimizer: Any, saved: Any) -> None:
        trainer = find_trainer(Trainer, self) or self._known_trainer()
        self._belong_to(trainer)
        if self._watching is not None:
            self._watching.close()  # that of a training which was broken off
        # A Trainer fails to save the state of a callback that it did not know at the start, or that
        # the checkpoint it resumes from did not.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if is_disabled():
            return
        refuse_unknown_gradients(trainer)
        self._watch = Watch(trainer, optimizer, self._options, self._loss_fn)
        self._watch.start(state, saved)

    def _belong_to(self, trainer: Any) -> None:
        known = None if self._trainer is None else self._trainer()
        if known is not None and known is not trainer:
            raise UsageError(
                "GeomwatchCallback must belong to one Trainer, got a second one. Make a callback "
                "for each."
            )
        refuse_several(trainer, GeomwatchCallback)
        self._trainer = weakref.ref(trainer)
        if self.left_out is None:
            setattr(trainer, _USERS_OWN, self)
        else:
            self._complete(getattr(trainer, _USERS_OWN, None), self.left_out)
            self.left_out = None

    def _complete(self, users_own: GeomwatchCallback | None, left_out: list[str]) -> None:
        """Take what JSON could not hold from the user's own object, which goes on showing ours."""
        if users_own is not None:
            own = users_own._not_json()
            self._loss_fn = own.pop("loss_fn", None)
            self._options |= own
            users_own._heir = self
        elif left_out:
            logger.warning(
                "GeomwatchCallback was restored from a checkpoint without %s, which JSON can't "
                "hold. Leave out restore_callback_states_from_checkpoint: it finds its state "
                "without.",
                ", ".join(left_out),
            )

    def _not_json(self) -> dict[str, Any]:
        own = {"loss_fn": self._loss_fn, **self._options}
        return {name: value for name, value in own.items() if not is_json(value)}

    def _known_trainer(self) -> Any:
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            raise UsageError(
                "GeomwatchCallback must know its Trainer, found none that calls it. Call "
                "callback.attach(trainer) before trainer.train()."
            )
        return trainer
