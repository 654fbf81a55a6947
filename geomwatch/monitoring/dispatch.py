"""Rules and controllers applied to each step; what they say sent to whom it concerns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from geomwatch.controllers.conductor import Conductor
from geomwatch.errors import UsageTypeError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.budget import Account
from geomwatch.monitoring.history import Ring, of_adjustment, of_alert, of_look, of_record
from geomwatch.observation.findings import Present
from geomwatch.observation.observer import Observer
from geomwatch.observation.step import Observation, Settled
from geomwatch.parallel.ranks import is_first_rank
from geomwatch.records import Alert, Look, Record, gravest
from geomwatch.rules.calm import Calm, all_calm
from geomwatch.rules.default import resolve
from geomwatch.rules.rule import Rule
from geomwatch.sinks.lines import (
    Line,
    Sink,
    adjustment_line,
    alert_line,
    end_line,
    look_line,
    record_line,
)
from geomwatch.sinks.log import Log, logger
from geomwatch.sinks.outlet import Outlet

T = TypeVar("T")
_OF_THE_LOSS = ("loss_rise", "non_finite")  # what rules remember of any parameters
_OFTEN = ("step", "norm")  # what rules read that there is without a look


class Dispatch(Resumable):
    """Observation -> alerts, adjustments -> log, sinks, callback; these three on rank zero only.

    An adjustment is logged before it is applied.
    """

    _observer: Kept[Observer]
    _rules: Kept[list[Any]]  # those with a memory

    def __init__(
        self,
        rules: Sequence[Rule] | Rule | None,
        sinks: Sequence[Sink],
        on_alert: Callable[[Alert], None] | None,
        control: Conductor,
        account: Account | None = None,
    ) -> None:
        check_on_alert(on_alert)
        self._judges = resolve(rules)
        self._often: list[Any] = [
            rule for rule in self._judges if _reads(rule) in _OFTEN or hasattr(rule, "waits")
        ]
        self._rules = [rule for rule in self._judges if hasattr(rule, "state_dict")]
        of_curvature = (r for r in self._rules if r.name not in _OF_THE_LOSS)
        self._at_first = [(r, r.state_dict()) for r in of_curvature if isinstance(r, Resumable)]
        self._observer = Observer()
        self._outlets = [Outlet(Log()), *map(Outlet, sinks)]
        self._is_open = False  # its first line was sent, its last not yet
        self._on_alert = on_alert
        self._control = control
        self._broken: set[int] = set()  # ids of what has raised and was reported
        self.name = ""  # of the monitor, in a group
        self._account = account
        self._ratio: float | None = None  # of an update, as last sampled
        self._told = 0  # alerts that a look has spoken of
        self.history = Ring(of_record)
        self.looks = Ring(of_look)
        self.alerts = Ring(of_alert)
        self.adjustments = Ring(of_adjustment)

    def __call__(self, step: Observation, record: Record | None) -> Record | None:
        """Judge one step; return its record, if any, with what it led to."""
        step = self._observer(step, self._control.cap)
        judged = step if step.cap == math.inf else step.applied
        asked = [rule for rule in self._judges if is_due(rule, judged)]
        verdicts = [self._safely(rule, judged) for rule in asked]
        alerts = [alert for alert in verdicts if alert is not None]
        adjustments = self._control(step, alerts)
        if record is not None:
            record = replace(
                record,
                alerts=tuple(alerts),
                adjustments=tuple(adjustments),
                knobs=self._control.values(step.lr),
            )
            self.history.append(record)
            self.emit(record_line(record))
        if step.gradient_fresh or step.movement is not None:
            self._note(judged, alerts)
        self._tell(alerts)
        for adjustment in adjustments:
            self.adjustments.append(adjustment)
            self.emit(adjustment_line(adjustment))
        self._control.apply(step.lr)
        return record

    def calm(self) -> Calm | None:
        """Return of which losses and norms no rule has anything to say at once; None for none."""
        lets: list[Calm] = []
        if self._control.knobs:  # a controller goes by what changes with the step itself
            return None
        for rule in self._often:
            if getattr(rule, "waits", False):
                return None
            if _reads(rule) in _OFTEN:
                calm = self._safely(rule.lets_wait) if _is_patient(rule) else None
                if calm is None:
                    return None
                lets.append(calm)
        return all_calm(lets)

    @property
    def known_until(self) -> float:
        """The step at which something that is known from before may be no longer."""
        return self._observer.known_until

    def waited(self, steps: Sequence[tuple[Settled, Present]]) -> None:
        """Show rules some steps in a row that were calm."""
        for rule in self._often:
            if _reads(rule) in _OFTEN:
                self._safely(rule.waited, steps)

    def _tell(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self.alerts.append(alert)
            self.emit(alert_line(alert))
            if self._on_alert is not None and is_first_rank():
                self._safely(self._on_alert, alert)

    def _note(self, step: Observation, alerts: Sequence[Alert]) -> None:
        """Keep what was seen along a step, for trackers and files."""
        if step.movement is not None:
            self._ratio = step.movement.relative / max(step.movement.steps, 1)
        if not step.gradient_fresh or step.gradient_margin is None:
            return
        gone = self.alerts.dropped
        before, self._told = self._told, gone + len(self.alerts) + len(alerts)
        look = Look(
            step.index,
            step.rate,
            step.gradient_margin,
            self._limit(step),
            self._ratio,
            None if self._account is None else self._account.share,
            gravest(a.severity for a in (*self.alerts[max(before - gone, 0) :], *alerts)),
            None if step.settled is None else step.settled.loss,
        )
        self.looks.append(look)
        self.emit(look_line(look))

    def _limit(self, step: Observation) -> float | None:
        """Return what the gradient margin of a step is held against."""
        if not step.has_limit:
            return None
        levels = (getattr(rule, "level_at", None) for rule in self._judges)
        level_at = next((level for level in levels if level is not None), None)
        return step.limit_ratio if level_at is None else float(level_at(step))

    def forget(self) -> None:
        """Forget what was measured of other parameters, or of another optimizer."""
        self._observer = Observer()
        for rule, state in self._at_first:
            rule.load_state_dict(state)

    def begin(self, first: Line) -> None:
        """Send the first line of a run."""
        self._is_open = True
        self.emit(first)

    def emit(self, line: Line) -> None:
        """Send a line to the log and the sinks."""
        if self.name:
            line = {**line, "monitor": self.name}
        if is_first_rank():
            for outlet in self._outlets:
                outlet(line)

    def end(
        self, steps: int, seconds: float, overhead: float | None, lr: tuple[float, ...]
    ) -> None:
        """Send the last line of a run that has begun, and close the sinks."""
        if self._is_open:
            self.emit(
                end_line(steps, seconds, overhead, records=self.history, alerts=self.alerts, lr=lr)
            )
        self._is_open = False
        for outlet in self._outlets:
            outlet.close()

    @property
    def rule_names(self) -> list[str]:
        """The rules by name, in their order."""
        return [rule.name for rule in self._judges]

    def _safely(self, part: Callable[..., T], *arguments: Any) -> T | None:
        """Call a part; a full disk or a bug in a callback must not stop a training run."""
        try:
            return part(*arguments)
        except Exception as error:  # of the user's own code, say
            if id(part) not in self._broken:
                self._broken.add(id(part))
                logger.warning(
                    "%r failed with %s: %s. Training goes on, and it will be called again; this is "
                    "said once.",
                    part,
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
            return None


def check_on_alert(on_alert: object) -> None:
    """Refuse what can't be called with an alert.

    Raises:
        UsageTypeError: it can't.
    """
    if on_alert is None or (callable(on_alert) and not isinstance(on_alert, type)):
        return
    name = on_alert if isinstance(on_alert, str) and on_alert.isidentifier() else "print"
    raise UsageTypeError(
        f"on_alert must be a function of an Alert, got {on_alert!r:.60}.", write=f"on_alert={name}"
    )


def is_due(rule: Rule, step: Observation) -> bool:
    """Tell whether a rule is to be asked about this step."""
    reads = _reads(rule)
    if reads == "step" or getattr(rule, "waits", False):
        return True
    if reads == "taken":
        return step.taken is not None
    if isinstance(reads, tuple):
        return all(name in (step.estimates or ()) for name in reads)
    if step.fresh or ((step.gradient_fresh or step.rehearsed) and reads != "probe"):
        return True
    if reads == "norm":
        return step.tells_norm
    return reads == "rise" and step.jump > 1


def _is_patient(rule: Rule) -> bool:
    """Tell whether a rule says what may wait; what judges otherwise than its parent does not."""
    for kind in type(rule).__mro__:
        if "lets_wait" in vars(kind):
            return True
        if "__call__" in vars(kind):
            return False
    return False


def _reads(rule: Rule) -> str | tuple[str, ...]:
    return getattr(rule, "reads", "step")
