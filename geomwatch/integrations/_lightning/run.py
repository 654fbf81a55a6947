"""One fit() of a Trainer, watched: a monitor for each optimizer, fed by a Tap on the module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError
from geomwatch.integrations._lightning.check import difference_to_training, refuse
from geomwatch.integrations._lightning.host import steps_taken, trained_model
from geomwatch.integrations._lightning.loss import MicroBatch, StepLoss
from geomwatch.integrations._lightning.tap import StepCall, Tap
from geomwatch.integrations._lightning.watch import Watch
from geomwatch.monitoring.group import Group
from geomwatch.monitoring.monitor import Monitor
from geomwatch.monitoring.options import Options
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Alert, Record
from geomwatch.sinks import logger


class Run:
    """Feeds the monitors while a Trainer fits; `close` leaves module and optimizers as they were.

    Under automatic optimisation the window of a step are the batches since the last one for which
    training_step gave a loss. Under manual optimisation they are those whose backward pass left
    the optimizer's parameters a gradient that nobody has zeroed since.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        losses: Mapping[str, LossFn | None],
        options: Options,
        states: Mapping[str, Any],
    ) -> None:
        self._trainer, self._module, self._options = trainer, module, options
        self.ranks = Ranks.of(trained_model(trainer))
        self._automatic = bool(module.automatic_optimization)
        self._users_own = any(given is not None for given in losses.values())
        self._checked = not self._automatic  # else the loss of a step is not known
        self._trainable = _trainable(module)
        self._records: list[tuple[str, Record]] = []
        self.watches: list[Watch] = []
        self.is_open = True
        self._tap = Tap(trainer, module, self)
        try:
            for (name, given), optimizer in zip(losses.items(), trainer.optimizers, strict=True):
                loss = StepLoss(trainer, module, self._tap.training_step, given)
                watch = Watch(name, trainer, module, optimizer, loss)
                self.watches.append(watch)
                watch.start(options)
                watch.take_up(states.get(name), steps_taken(trainer))
        except BaseException:
            self.close()
            raise

    @property
    def monitor(self) -> Monitor | Group:
        """The monitor, or those of several optimizers by name."""
        if len(self.watches) == 1:
            return self.watches[0].monitor
        return Group(**{watch.name: watch.monitor for watch in self.watches})

    def batch_begins(self, index: int) -> None:
        """Note that another batch begins; the first of an epoch may train other parameters."""
        self._tap.next_batch()
        if index == 0 and _trainable(self._module) != self._trainable:
            self._trainable = _trainable(self._module)
            logger.info("other parameters are trained from now on, and measured.")
            for watch in self.watches:
                watch.restart(self._options)

    def batch_ends(self, index: int) -> list[tuple[str, Record]]:
        """Return the records of this batch, each with the name of its optimizer.

        Raises:
            UsageError: the module has stepped an optimizer itself.
        """
        for watch in self.watches:
            watch.check_steps()
            watch.batch_ends(index)
        records, self._records = self._records, []
        return records

    def new_alerts(self) -> list[Alert]:
        """Return the alerts since the last call."""
        return [alert for watch in self.watches for alert in watch.new_alerts()]

    def trained_on(self, call: StepCall) -> None:
        """Hear of a training_step that has returned a loss."""
        if self._automatic:
            self.watches[0].add(call)

    def backward_begins(self) -> None:
        """Forget the batches whose gradients have been zeroed."""
        for watch in self.watches:
            if not self._automatic and not watch.params:
                watch.window.clear()

    def backward_ends(self) -> None:
        """Note for each optimizer whether this batch has left it a gradient."""
        call = self._tap.present
        if self._automatic or call is None:
            return
        for watch in self.watches:
            if watch.params:
                watch.add(call)

    def gradient_complete(self, optimizer: Any) -> None:
        """At the first step, make sure that a probe measures the loss trained on.

        Raises:
            UsageError: it would measure another one.
        """
        watch = self._watch_of(optimizer)
        if self._checked or watch is None or not watch.params:
            return
        if not self.ranks.all(_is_finite(watch.window)):
            return
        self._checked = True
        window = [MicroBatch.of(call) for call in watch.window]
        try:
            with self.ranks.refused_together():
                loss, gradient = difference_to_training(
                    self._module, watch.loss, window, watch.params, self.ranks
                )
        except UsageError:
            raise
        except Exception as error:  # a probe will say more, and training goes on
            logger.warning(
                "whether the loss measured is the loss trained on could not be checked: %s: %s",
                type(error).__name__,
                error,
            )
            return
        self._tell(loss, gradient)

    def stepping(self, optimizer: Any, norm: Tensor | None) -> None:
        """Watch the coming step."""
        watch = self._watch_of(optimizer)
        if watch is None or not watch.is_new_step():
            return
        window, watch.window = watch.window, []
        if not window and not self._automatic and self._tap.present is not None:
            window = [self._tap.present]  # a second step on the same batch, or a plain backward()
        if not window or not watch.params:  # training_step has left the step out
            return
        known = self._tap.settle(window)
        record = watch.step(window, norm, known=known)
        if record is not None:
            self._records.append((watch.name, record))

    def state(self) -> dict[str, Any]:
        """Return the state of each monitor by name."""
        return {watch.name: watch.monitor.state_dict() for watch in self.watches}

    def close(self) -> None:
        """Leave the module and its optimizers as they were."""
        self.is_open = False
        self._tap.close()
        for watch in self.watches:
            watch.close()

    def _tell(self, loss: str, gradient: str) -> None:
        if loss and not self._users_own:
            refuse(loss)
        if loss:
            logger.warning(
                "loss_fn gives %s. Curvature is measured of loss_fn, and the stability margin is "
                "right for that loss only.",
                loss,
            )
        if gradient:
            logger.warning(
                "the gradient that is stepped with lies %s: a hook, a callback or the module's own "
                "backward() changes it. Curvature is measured of the loss alone.",
                gradient,
            )

    def _watch_of(self, optimizer: Any) -> Watch | None:
        return next((watch for watch in self.watches if watch.optimizer is optimizer), None)


def _is_finite(window: list[StepCall]) -> bool:
    losses = [call.loss for call in window if not call.is_spoilt]
    finite = [loss for loss in losses if loss is not None and math.isfinite(float(loss))]
    return len(finite) == len(window) > 0


def _trainable(module: nn.Module) -> frozenset[int]:
    return frozenset(id(p) for p in module.parameters() if p.requires_grad)
