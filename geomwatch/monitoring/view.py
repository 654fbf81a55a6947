"""What a monitor shows of its run; nothing here changes anything."""

from __future__ import annotations

from typing import NoReturn, Protocol, TypeVar

from torch import Tensor

from geomwatch.errors import UsageTypeError
from geomwatch.monitoring.budget import Account
from geomwatch.monitoring.changes import Changes
from geomwatch.monitoring.history import Ring
from geomwatch.monitoring.step_counter import StepCounter
from geomwatch.records import Adjustment, Alert, Look, Record

V = TypeVar("V", bound="View")


class Told(Protocol):
    """What rules, controllers and looks have made of a run."""

    name: str
    history: Ring[Record]
    looks: Ring[Look]
    alerts: Ring[Alert]
    adjustments: Ring[Adjustment]


class View:
    """The side of a Monitor that is read: its run so far, and what it is called."""

    _account: Account
    _changes: Changes
    _counter: StepCounter
    _dispatch: Told

    @property
    def name(self) -> str:
        """What stands in front of all it says; a Group sets it."""
        return self._dispatch.name

    @name.setter
    def name(self, name: str) -> None:
        self._dispatch.name = name

    @property
    def history(self) -> Ring[Record]:
        """The records so far: the last 10,000, and those with an extreme (see `Ring`)."""
        return self._dispatch.history

    @property
    def looks(self) -> Ring[Look]:
        """What sentinels and probes have seen along steps so far; bounded."""
        return self._dispatch.looks

    @property
    def alerts(self) -> Ring[Alert]:
        """The alerts so far, bounded as `history` is."""
        return self._dispatch.alerts

    @property
    def adjustments(self) -> Ring[Adjustment]:
        """The adjustments so far, with those that a dry run or advice only speaks of; bounded."""
        return self._dispatch.adjustments

    @property
    def seconds(self) -> float:
        """Wall time spent in `step` so far."""
        return self._account.seconds

    @property
    def overhead(self) -> float | None:
        """What was spent as a share of the time of training so far; None while there was none."""
        return self._account.share

    @property
    def params(self) -> list[Tensor]:
        """The parameters that it measures."""
        return list(self._changes.layout.params)

    def __deepcopy__(self: V, memo: object) -> V:
        """Return itself: a copy of what holds a monitor, as of averaged weights, is not watched."""
        return self

    def __reduce__(self) -> NoReturn:
        raise UsageTypeError(
            "a Monitor can't be pickled: it is bound to the model and the optimizer of this "
            "process. Save monitor.state_dict(), build one where it is loaded, and leave it out of "
            "what is pickled."
        )

    def __repr__(self) -> str:
        """Return where the run is, and what was seen of it, on one line."""
        loud = sum(alert.severity != "info" for alert in self.alerts)
        margins = [r.estimates.get("stability_margin") for r in self.history[-1:]]
        margin = f", stability margin {margins[0]}" if margins and margins[0] is not None else ""
        return (
            f"<Monitor at step {self._counter.steps}: {len(self.history)} probes, "
            f"{len(self.looks)} looks, {loud} alerts{margin}>"
        )
