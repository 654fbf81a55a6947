"""geomwatch in a Hugging Face Trainer: `Trainer(..., callbacks=[GeomwatchCallback(every=100)])`.

The loop of a Trainer, with what is done where:

    for inputs in window:                             # gradient_accumulation_steps micro-batches
        training_step(model, inputs, num_items_in_batch)
            loss = compute_loss(...)                  # inputs, keywords, random state are kept
            accelerator.backward(loss)
    accelerator.clip_grad_norm_(...)                  # the norm it returns is kept
    on_pre_optimizer_step
        <the monitor is stepped here>                 # the gradient is that of the coming step
    optimizer.step()
    on_optimizer_step                                 # the record is logged
    lr_scheduler.step(); model.zero_grad(); global_step += 1
    on_step_end                                       # saves or stops after a critical alert
"""

from __future__ import annotations

import logging
from typing import Any, Literal

from typing_extensions import Unpack

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.integrations._host.elsewhere import NotOfLightning
from geomwatch.integrations._host.options import Options
from geomwatch.integrations._host.words import (
    missing,
    survived,
    tell_of_a_short_run,
    tell_of_joining,
)
from geomwatch.integrations._transformers.checkpoint import CheckpointedCallback, from_json
from geomwatch.integrations._transformers.trainer import (
    find_trainer,
    holds,
    refuse_unknown_gradients,
)
from geomwatch.integrations._transformers.watch import TrainingWatch
from geomwatch.monitoring.face import is_disabled
from geomwatch.monitoring.monitor import Monitor
from geomwatch.quantities.measurement import Measurement
from geomwatch.records import Record
from geomwatch.sinks.log import logger

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise missing("transformers", "transformers") from error


class GeomwatchCallback(CheckpointedCallback, NotOfLightning, TrainerCallback, ExportableState):
    """Watches the geometry of the loss that a Trainer trains on, and warns before it goes wrong.

    Nothing else needs to be done. A probe is logged like the Trainer's own losses, to all its
    trackers and to `log_history`, and training stays bit-identical. What is measured is the loss
    that compute_loss returned in training, whatever computes it there; at the first step it is
    computed again, with its gradient, and compared.

    Args:
        how: how to measure: a `geomwatch.Measurement`.
        prefix: in front of the names of quantities in the logs.
        on_critical: at a critical alert "save" a checkpoint, or "stop" the training.
        loss_fn: (model, inputs) -> the loss of a micro-batch, where training_step does not get it
            from one call of compute_loss. The inputs are those of compute_loss, or else those of
            training_step; micro-batches count by their items or by `loss_fn.weight(inputs)`.
        **options: every, budget, rules, controllers, sinks, on_alert: those of `Monitor`.

    Raises:
        UsageError: (a ValueError) an option can't work; at construction, when training begins, or
            at its first step.
    """

    def __init__(
        self,
        how: Measurement | None = None,
        *,
        prefix: str = "geom/",
        on_critical: Literal["save", "stop"] | None = None,
        loss_fn: LossFn | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(how, options, [loss_fn], prefix, on_critical, loss_fn=loss_fn)
        self._record: Record | None = None  # to be logged once the step is taken
        self._told = False

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
        self._take_trainer(trainer)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Get to know the Trainer."""
        trainer = find_trainer(Trainer, self)
        if trainer is not None:
            self._take_trainer(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start to watch, from the state that a checkpoint holds if training resumes from one."""
        self._begin(state, kwargs["optimizer"], self._take_up_state(state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Join in, where the callback has been added to a training under way."""
        if not self._watching and not is_disabled():
            tell_of_joining(state.global_step)
            self._begin(state, kwargs["optimizer"], None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Probe, if it is due: the gradient is complete, and the step not yet taken."""
        if self._watching:
            self._record = self._watch.step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a probe; `global_step` is still the number of steps taken before this one."""
        record, self._record = self._record, None
        looks = self._watch.new_looks() if self._watching else []
        scalars = {} if record is None else record.scalars(self._prefix)
        for look in looks:
            scalars |= look.scalars(self._prefix)
        if scalars:
            should_log = control.should_log
            # Not the log() of a subclass: some empty their averages in it, or look for a "loss".
            kind = "look" if record is None else "record"
            with survived(f"the {kind} of step {state.global_step} did not reach all trackers"):
                Trainer.log(self._known_trainer(), scalars)
            control.should_log = should_log  # which log() takes for done

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save or stop after a critical alert."""
        if self._watching:
            alerts, ranks = self._watch.new_alerts(), self._watch.ranks
            action = self._reaction(alerts, ranks, state.global_step)
            control.should_save |= action == "save"
            control.should_training_stop |= action == "stop"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the Trainer as it was."""
        if self._watching:
            self._watch.close()

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

    def _begin(self, state: Any, optimizer: Any, saved: Any) -> None:
        trainer = find_trainer(Trainer, self) or self._known_trainer()
        self._take_trainer(trainer)
        if self._watching:
            self._watch.close()  # that of a training which was broken off
        # A Trainer fails to save the state of a callback that it did not know at the start, or that
        # the checkpoint it resumes from did not.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if is_disabled():
            return
        refuse_unknown_gradients(trainer)
        self._watch = TrainingWatch(trainer, optimizer, self._options, self._loss_fn)
        every, steps = self._options.given.get("every"), state.max_steps - state.global_step
        tell_of_a_short_run(every, steps)
        self._watch.go_on_from(None if saved is None else from_json(saved), state.global_step)

    def _known_trainer(self) -> Any:
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            raise UsageError(
                "GeomwatchCallback must know its Trainer, found none that calls it. Call "
                "callback.attach(trainer) before trainer.train()."
            )
        return trainer
