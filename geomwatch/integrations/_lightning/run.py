"""One fit() of a Trainer, watched: a monitor for each optimizer, fed by a tap on the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from geomwatch.controllers.actuators import Actuator
from geomwatch.curvature.objective import LossFn
from geomwatch.integrations._host.actuators import HostAccumulation
from geomwatch.integrations._host.loss import mean_of
from geomwatch.integrations._host.options import MonitorOptions
from geomwatch.integrations._host.watch import HostWatch
from geomwatch.integrations._host.words import tell_of_a_short_run
from geomwatch.integrations._lightning.actuators import actuators_of
from geomwatch.integrations._lightning.host import (
    gradient_scale,
    names_of,
    steps_taken,
    steps_to_come,
    trained_model,
)
from geomwatch.integrations._lightning.loss import StepLoss, check_window
from geomwatch.integrations._lightning.tap import StepCall, StepTap
from geomwatch.integrations._lightning.window import Window, is_comparable
from geomwatch.monitoring.group import Group
from geomwatch.monitoring.monitor import Monitor
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Alert, Look, Record
from geomwatch.sinks.log import logger


class OptimizerWatch(HostWatch[StepLoss]):
    """Watches one optimizer; of several, by its own parameters and under its name.

    Raises:
        UsageError: an option can't work.
    """

    def __init__(
        self,
        name: str,
        trainer: Any,
        module: nn.Module,
        optimizer: Any,
        loss: StepLoss,
        options: MonitorOptions,
    ) -> None:
        self.name, self.optimizer, self.loss = name, optimizer, loss
        self._trainer, self._module, self._options = trainer, module, options
        self._accumulations: list[HostAccumulation] = []
        super().__init__(self._new_monitor(), loss, Ranks.of(trained_model(trainer)))
        self.window = Window(trainer, optimizer)

    def renew(self) -> None:
        """Measure, of several optimizers, the parameters that this one holds now."""
        if self.name:
            self.follow(self.optimizer)

    def follow(self, optimizer: Any) -> None:
        """Watch the steps of another optimizer, which has taken the place of this one."""
        self.optimizer = optimizer
        self.window.follow(optimizer)
        names = names_of(optimizer, self._module, self._options.how.params)
        self.monitor.follow(optimizer, params=(self.name and names) or None)

    def check(self) -> None:
        """At the first step, make sure that a probe measures the loss trained on.

        Raises:
            UsageError: it would measure another one.
        """
        params, calls = self.window.params, self.window.calls
        if not self.is_checked and params and self.ranks.all(is_comparable(calls)):
            window = self.loss.micro_batches(calls)
            self.check_once(
                lambda: check_window(self._module, self.loss, window, params, self.ranks)
            )

    def step(self, calls: Sequence[StepCall], norm: Tensor | None, *, known: bool) -> Record | None:
        """Watch the coming step, whose gradient had this norm before clipping.

        Calls that are not `known` can't be made again.
        """
        scale = gradient_scale(self._trainer, self.optimizer)
        return self.watch_step(
            self.loss.micro_batches(calls)
            if known
            else "training_step has changed this batch in place",
            loss=mean_of([call.loss for call in calls]),
            grad_norm=None if norm is None else norm / scale,
            grad_scale=scale,
        )

    def batch_ends(self, index: int) -> None:
        """Change the accumulation, if a controller wants it and a window ends; check the steps.

        Raises:
            UsageError: the first step was taken behind Lightning's back.
        """
        for accumulation in self._accumulations:
            accumulation.counted(index + 1)
        self.window.check_steps()

    def close(self) -> None:
        """Leave the optimizer as it was; the history stays."""
        self.window.close()
        super().close()

    def _new_monitor(self) -> Monitor:
        how, own = self._options.how, dict[str, Any]()
        if how.batch is not None:
            own["batch"] = self.loss.prepared(how.batch)
        names = names_of(self.optimizer, self._module, how.params)
        if not names:
            logger.warning(
                "configure_optimizers() gives %s no parameter of the module that is to be "
                "measured: there are no steps to probe before.",
                type(self.optimizer).__name__,
            )
        elif self.name:
            own["params"] = names
        model = trained_model(self._trainer)
        return self._options.monitor(
            model, self.loss, self.optimizer, actuators=self._actuators, **own
        )

    def _actuators(self) -> list[Actuator]:
        found = actuators_of(self._trainer, self._module, self.optimizer)
        self._accumulations = [knob for knob in found if isinstance(knob, HostAccumulation)]
        return found


class Run(StepTap):
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
        options: MonitorOptions,
        states: Mapping[str, Any],
    ) -> None:
        super().__init__(trainer, module)
        self._module = module
        self.ranks = Ranks.of(trained_model(trainer))
        self._automatic = bool(module.automatic_optimization)
        self._trainable = _trainable(module)
        self._records: list[tuple[str, Record]] = []
        self.watches: list[OptimizerWatch] = []
        if not trainer.fast_dev_run:
            tell_of_a_short_run(options.given.get("every"), steps_to_come(trainer))
        try:
            for (name, given), optimizer in zip(losses.items(), trainer.optimizers, strict=True):
                loss = StepLoss(trainer, module, self.training_step, given)
                watch = OptimizerWatch(name, trainer, module, optimizer, loss, options)
                watch.is_checked = not self._automatic  # where the loss of a step is not known
                self.watches.append(watch)
                watch.go_on_from(states.get(name), steps_taken(trainer))
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
        self.next_batch()
        if index == 0 and _trainable(self._module) != self._trainable:
            self._trainable = _trainable(self._module)
            for watch in self.watches:
                watch.renew()

    def batch_ends(self, index: int) -> list[tuple[str, Record]]:
        """Return the records of this batch, each with the name of its optimizer.

        Raises:
            UsageError: the module has stepped an optimizer itself.
        """
        for watch in self.watches:
            watch.batch_ends(index)
        records, self._records = self._records, []
        return records

    def new_looks(self) -> list[tuple[str, Look]]:
        """Return what was seen along steps since the last call, with the optimizers' names."""
        return [(watch.name, look) for watch in self.watches for look in watch.new_looks()]

    def new_alerts(self) -> list[Alert]:
        """Return the alerts since the last call."""
        return [alert for watch in self.watches for alert in watch.new_alerts()]

    def trained_on(self, call: StepCall) -> None:
        """Add a call of training_step to the window."""
        if self._automatic:
            self.watches[0].window.add(call)

    def backward_begins(self) -> None:
        """Forget the batches whose gradients have been zeroed by hand."""
        for watch in self.watches:
            if not self._automatic and not watch.window.params:
                watch.window.take()

    def backward_ends(self) -> None:
        """Note for each optimizer whether a backward pass by hand has left it a gradient."""
        for watch in self.watches:
            if not self._automatic and self.present is not None and watch.window.params:
                watch.window.add(self.present)

    def gradient_complete(self, optimizer: Any) -> Tensor | None:
        """Check against training, at the first step; return the norm of the gradient.

        Raises:
            UsageError: a probe would measure another loss.
        """
        watch = self._watch_of(optimizer)
        if watch is None:
            return None
        watch.check()
        return watch.window.norm()

    def stepping(self, optimizer: Any, norm: Tensor | None) -> None:
        """Watch the coming step."""
        watch = self._watch_of(optimizer)
        if watch is None or not watch.window.is_new_step():
            return
        calls = watch.window.take()
        if not calls and not self._automatic and self.present is not None:
            calls = [self.present]  # a second step on the same batch, or a plain backward()
        if not calls or not self._has_gradient(watch):  # training_step has left the step out
            return
        record = watch.step(calls, norm, known=self.settle(calls))
        if record is not None:
            self._records.append((watch.name, record))

    def state(self) -> dict[str, Any]:
        """Return the state of each monitor by name."""
        return {watch.name: watch.monitor.state_dict() for watch in self.watches}

    def close(self) -> None:
        """Leave the module and its optimizers as they were."""
        super().close()
        for watch in self.watches:
            watch.close()

    def _has_gradient(self, watch: OptimizerWatch) -> bool:
        """Tell whether there is a gradient, if of tensors alone that its optimizer has lost."""
        if watch.window.params or not self._automatic:
            return bool(watch.window.params)
        steps = any("lr" in group for group in watch.optimizer.param_groups)  # Lightning's mock: no
        return steps and any(p.grad is not None for p in _trained(self._module))

    def _watch_of(self, optimizer: Any) -> OptimizerWatch | None:
        """Return the watch of an optimizer, one that has taken the place of another included."""
        known = {id(watch.optimizer): watch for watch in self.watches}
        if id(optimizer) in known:
            return known[id(optimizer)]
        present = set(map(id, self._trainer.optimizers))
        gone = [watch for number, watch in known.items() if number not in present]
        if len(gone) == 1:
            gone[0].follow(optimizer)
            return gone[0]
        self.watches[0].say_once(
            f"the steps of a new {type(optimizer).__name__} are not watched: fit() began with "
            f"{len(known)} optimizers, of which {len(gone)} are gone."
        )
        return None


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _trainable(module: nn.Module) -> frozenset[int]:
    return frozenset(map(id, _trained(module)))
