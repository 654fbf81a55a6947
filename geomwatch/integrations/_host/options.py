"""What a host's user asks for: checked where it is written, used when a run begins."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from geomwatch.controllers.actuators import Actuator
from geomwatch.controllers.protocol import Controller, copies
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.integrations._host.loss import HostLoss
from geomwatch.monitoring.monitor import Monitor
from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.measurement import Measurement, check_how, refuse_options
from geomwatch.records import Alert
from geomwatch.rules.rule import Rule
from geomwatch.sinks.lines import Sink
from geomwatch.sinks.log import logger


class Options(TypedDict, total=False):
    """What `Monitor` takes beside model, loss_fn, optimizer and `how`, with its defaults."""

    every: int | None
    budget: float | None
    rules: Sequence[Rule] | Rule | None
    controllers: Sequence[Controller] | Controller
    sinks: Sequence[Sink | str | Path] | Sink | str | Path
    on_alert: Callable[[Alert], None] | None


class MonitorOptions:
    """How to measure and what else a Monitor takes, carried to where there is something to watch.

    `given` is what the user has passed, without defaults.

    Raises:
        UsageError: there is no such option.
    """

    def __init__(self, call: str, how: Measurement | None, options: Mapping[str, Any]) -> None:
        known = Options.__annotations__
        refuse_options(call, {name: v for name, v in options.items() if name not in known})
        self.given = {**options, **({} if how is None else {"how": how})}

    @property
    def how(self) -> Measurement:
        """How to measure."""
        return check_how(self.given.get("how"))

    def check(self, losses: Iterable[Any]) -> None:
        """Raise now what Monitor would raise when a run begins, except about what needs a model.

        Raises:
            UsageError: an option can't work, or a loss is no function.
        """
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        # `params` need a model, and `batch` may be a DataLoader to read
        options = {**self.given, "how": replace(self.how, params=None, batch=None)}
        for loss_fn in losses:
            Monitor(model, _no_loss if loss_fn is None else loss_fn, optimizer, **options)

    def monitor(
        self,
        model: nn.Module,
        loss: HostLoss,
        optimizer: Any,
        *,
        actuators: Callable[[], Iterable[Actuator]],
        of_one_run: bool = False,
        **how: Any,
    ) -> Monitor:
        """Return the Monitor of a run.

        Args:
            actuators: makes what the host lets controllers turn; asked where there are any.
            of_one_run: the options are used once; else each run gets controllers of its own.
            how: fields of the Measurement that the host has an answer of its own to.

        Raises:
            UsageError: an option can't work.
        """
        also = (*self.how.also, *loss.isolates())
        options = {**self.given, "how": replace(self.how, also=also, **how)}
        if not of_one_run:
            options["controllers"] = copies(options.get("controllers", ()))
        monitor = Monitor(model, loss, optimizer, **options)
        if not of_one_run:
            monitor.address = "callback.monitor"
        if options.get("controllers"):
            monitor.equip(*actuators())
        return monitor


class HostCallback:
    """What the callbacks of all hosts have in common: options, one Trainer, and `on_critical`."""

    def __init__(
        self,
        how: Measurement | None,
        options: Mapping[str, Any],
        losses: Iterable[Any],
        prefix: str,
        on_critical: str | None,
    ) -> None:
        if on_critical not in (None, "save", "stop"):
            raise UsageError(f'on_critical must be "save", "stop" or None, got {on_critical!r}.')
        if not isinstance(prefix, str):
            raise UsageTypeError(f"prefix must be a string, got {type(prefix).__name__}.")
        self._options = MonitorOptions("GeomwatchCallback(", how, options)
        self._options.check(losses)
        self._prefix, self._on_critical = prefix, on_critical
        self._trainer: weakref.ref[Any] | None = None

    def _belong_to(self, trainer: Any, callbacks: Sequence[object]) -> None:
        """Take this Trainer, with these callbacks, for its own.

        Raises:
            UsageError: it has another one, or several such callbacks, or this one twice.
        """
        known = None if self._trainer is None else self._trainer()
        if known is not None and known is not trainer:
            raise UsageError(
                "GeomwatchCallback must belong to one Trainer, got a second one. Make a callback "
                "for each."
            )
        count = sum(isinstance(held, HostCallback) for held in callbacks)
        if count > 1:
            raise UsageError(
                f"{type(trainer).__name__} must have one GeomwatchCallback, got {count}. Both "
                "would measure and log the same; leave one out."
            )
        self._trainer = weakref.ref(trainer)

    def _reaction(self, alerts: Sequence[Alert], ranks: Ranks, step: int) -> str | None:
        """Return "save", "stop" or None: what is to be done after these alerts, on every rank.

        What is lost is never saved. Of several ranks, each must call it at each step: a host that
        saves or stops on one alone waits for the others forever.
        """
        if self._on_critical is None:
            return None
        rules = {alert.rule for alert in alerts if alert.severity == "critical"}
        if not ranks.any(bool(rules)):
            return None
        if self._on_critical == "stop":
            logger.warning("step %d: training stops, as on_critical asks.", step)
        elif ranks.any("non_finite" in rules):
            logger.warning(
                "step %d: no checkpoint is saved, although on_critical asks for it: what a loss or "
                "gradient that is not finite leaves behind is not worth it.",
                step,
            )
            return None
        return self._on_critical


def _no_loss(model: Any, batch: Any) -> Tensor:
    raise AssertionError("nothing is measured here")
