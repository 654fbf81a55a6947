"""geomwatch in Lightning: `Trainer(callbacks=[GeomwatchCallback(every=100)])`.

The loop of a Trainer, with what is done where:

    for batch in train_dataloader:
        on_train_batch_start
        loss = training_step(batch, batch_idx)        # batch, random state and loss are kept
        zero_grad()                                   # first batch of an accumulation window
        on_before_backward; (loss / accumulate_grad_batches).backward(); on_after_backward
        if the window is complete:
            on_before_optimizer_step                  # gradients unscaled
            configure_gradient_clipping
            <the monitor is stepped here>             # the gradient is that of the coming step
            optimizer.step()
        on_train_batch_end                            # records are logged; saves or stops
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Literal

from typing_extensions import Self, Unpack

from geomwatch.curvature.objective import LossFn
from geomwatch.integrations._host.elsewhere import NotOfTransformers, StateKey
from geomwatch.integrations._host.options import HostCallback, Options
from geomwatch.integrations._host.words import tell_of_joining
from geomwatch.integrations._lightning.host import (
    losses_by_name,
    publish,
    publish_looks,
    react,
    refuse_what_no_probe_can_follow,
    steps_taken,
    tell_of_no_training,
)
from geomwatch.integrations._lightning.names import as_callback, remade, written
from geomwatch.integrations._lightning.run import Run
from geomwatch.monitoring.face import is_disabled
from geomwatch.monitoring.group import Group
from geomwatch.monitoring.monitor import Monitor
from geomwatch.quantities.measurement import Measurement


class GeomwatchCallback(NotOfTransformers, HostCallback):
    """Watches the geometry of the loss that a Trainer trains on, and warns before it goes wrong.

    Nothing else needs to be done: no change to the LightningModule, of `lightning` or of
    `pytorch_lightning`. A probe goes to the Trainer's loggers once, at its step, and to
    `callback_metrics`, where ModelCheckpoint and EarlyStopping can monitor it; training stays
    bit-identical. What is measured is the loss that training_step returned, computed again with
    the same batch and random state; at the first step loss and gradient are compared.

    Args:
        how: how to measure: a `geomwatch.Measurement`.
        loss_fn: (module, batch) -> loss, instead of training_step; needed with manual
            optimisation. With several optimizers a dict that names one for each, in the order of
            `configure_optimizers()`. A module may offer a method `geometry_loss(batch)` instead.
        prefix: in front of the names of quantities in the logs.
        on_critical: at a critical alert "save" a checkpoint, or "stop" the training.
        **options: every, budget, rules, controllers, sinks, on_alert: those of `Monitor`.

    Raises:
        UsageError: (a ValueError) an option can't work; at construction, when fit() begins, or at
            its first step.
    """

    state_key = StateKey()

    # Never name an attribute `log` or `log_dict`: Lightning overwrites them.

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Make one that is a Callback of the Lightning in use."""
        made: Self = object.__new__(as_callback(cls))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what belongs to a Trainer; a copy may go to another one."""
        bound = {"_trainer": None, "_module": None, "_run": None}
        own = {k: v for k, v in vars(self).items() if k not in ("log", "log_dict")}
        return remade, (written(type(self)),), own | bound

    def __init__(
        self,
        how: Measurement | None = None,
        *,
        loss_fn: LossFn | Mapping[str, LossFn] | None = None,
        prefix: str = "geom/",
        on_critical: Literal["save", "stop"] | None = None,
        **options: Unpack[Options],
    ) -> None:
        losses = loss_fn.values() if isinstance(loss_fn, Mapping) else [loss_fn]
        super().__init__(how, options, losses, prefix, on_critical)
        self._loss_fn = loss_fn
        self._run: Run | None = None  # of the present fit() or the last one
        self._states: dict[str, Any] = {}  # of monitors, from a checkpoint or a fit() before
        self._module: weakref.ref[Any] | None = None  # of that fit()
        self._told = False

    @property
    def monitor(self) -> Monitor | Group | None:
        """The Monitor of the present or last fit(), a Group of several; None before the first."""
        return None if self._run is None else self._run.monitor

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Get to know the Trainer; refuse another one, or one with several such callbacks."""
        if is_disabled():
            return
        if stage != "fit":
            if self._run is None and not self._told:
                tell_of_no_training(getattr(stage, "value", stage))
            self._told = True
            return
        self._belong_to(trainer, trainer.callbacks)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what can't be watched, manual optimisation without a loss_fn for one."""
        if not is_disabled():
            refuse_what_no_probe_can_follow(trainer, pl_module)
            losses_by_name(pl_module, self._loss_fn, len(trainer.optimizers))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start to watch."""
        if not is_disabled():
            self._begin(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that a batch begins; join in, where the callback was added to a fit() under way."""
        first_of_window = batch_idx % trainer.accumulate_grad_batches == 0
        if self._watched() is None and first_of_window and not is_disabled():
            tell_of_joining(steps_taken(trainer))
            self.setup(trainer, pl_module, "fit")
            self.on_fit_start(trainer, pl_module)
            self._begin(trainer, pl_module)
        if run := self._watched():
            run.batch_begins(batch_idx)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Look whether a window accumulated by hand goes on or begins."""
        if run := self._watched():
            run.backward_begins()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Look whose gradient a backward pass called by hand has added to."""
        if run := self._watched():
            run.backward_ends()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Probe under manual optimisation; under automatic it is done after clipping."""
        if not pl_module.automatic_optimization and (run := self._watched()):
            run.stepping(optimizer, None)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand the records of this batch on, and react to critical alerts."""
        run = self._watched()
        if run is None:
            return
        for name, record in run.batch_ends(batch_idx):
            publish(trainer, pl_module, f"{self._prefix}{name}/" if name else self._prefix, record)
        alerts = run.new_alerts()
        publish_looks(trainer, self._prefix, run.new_looks(), alerts)
        react(trainer, self._reaction(alerts, run.ranks, steps_taken(trainer)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave module and Trainer as they were."""
        self._end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave module and Trainer as they were."""
        self._end()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitors' state for a checkpoint: tensors and primitives."""
        if run := self._watched():
            self._states = run.state()
        return {"monitors": self._states} if self._states else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; the first probe after it starts cold."""
        self._states, self._module = state_dict.get("monitors", {}), None

    def _watched(self) -> Run | None:
        return self._run if self._run is not None and self._run.is_open else None

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        losses = losses_by_name(pl_module, self._loss_fn, len(trainer.optimizers))
        another = self._module is not None and self._module() is not pl_module
        states = {} if another else self._states
        self._run = Run(trainer, pl_module, losses, self._options, states)
        self._module = weakref.ref(pl_module)

    def _end(self) -> None:
        if run := self._watched():
            self._states = run.state()
            run.close()
