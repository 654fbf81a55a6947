"""The rate is on its way beyond what the run can bear, as some steps ahead have shown."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import level
from geomwatch.observation.rehearsed import Rehearsed
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import advised_rate
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule

_Asked: TypeAlias = tuple[int, float]  # step and rate of a rehearsal


@dataclass(kw_only=True, eq=False, repr=False)
class Headroom(LatchedRule):
    """Warns when steps ahead at the rate that the run is headed for lose what was learnt.

    Each time the rate has grown by 1.4 the next 8 steps over the last 8 batches are rehearsed, with
    the real optimizer, at twice the rate (or the peak, where the schedule shows one nearer; the
    rate itself after a jump), and everything is put back. A warning when the loss of the last of
    these batches rises by more than `lost` of the range that the smoothed loss has covered, or by
    more than `soon` twice in a row; critical when that happens at the present rate. No model of the
    loss and no limit of an optimizer is used.
    """

    name = "headroom"
    reads = "look"
    says = ("warning", "critical")

    lost: float = level(
        0.5, "share of what was learnt that steps ahead lose", source="130 runs of ten tasks"
    )
    soon: float = level(0.2, "the same, twice in a row", source="130 runs of ten tasks")

    _before: Kept[_Asked | None] = field(init=False, default=None)  # step, rate
    _rose: Kept[bool] = field(init=False, default=False)  # by more than `soon`, the last time

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a step whose rate has grown so far that it was rehearsed."""
        if not step.rehearsed:
            return None
        found = step.rehearsed[0]
        before, self._before = self._before, (step.index, step.rate)
        again, self._rose = self._rose, found.rise > self.soon
        if found.rise <= (self.soon if again else self.lost):
            self._latch.calm(step.index)
            return None
        at_once = found if found.multiple <= 1 else step.rehearsals(1.0)
        severity: Severity = "warning"
        if at_once is not None and at_once.rise > self.lost:
            found, severity = at_once, "critical"
        if not self._latch.admit(severity, step.index):
            return None
        return self._alert(step, found, severity, before)

    def _alert(
        self, step: Observation, found: Rehearsed, severity: Severity, before: _Asked | None
    ) -> Alert:
        at = "at this rate" if found.multiple <= 1 else f"at {found.multiple:.2g} x this rate"
        lose = "end in a loss that is not finite"
        if math.isfinite(found.rise):
            lose = f"lose {found.rise:.0%} of what was learnt"
        factor = self._bearable(step) if severity == "critical" else 1.0
        what = "Let the learning rate rise no further: hold it at"
        if severity == "critical":
            what = f"Lower the learning rate from {step.rate:.3g} to"
        text = (
            f"{what} {advised_rate(step, factor)} or below. The next {found.steps} steps {at} "
            f"{lose} (alert above {self.lost:.0%}, or above {self.soon:.0%} twice)."
        )
        details = f"A rehearsal over the last batches shows that{_left(step, found, before)}."
        return alert(
            self.name,
            severity,
            text,
            value=found.rise,
            limit=self.lost,
            step=step.index,
            details=details,
            advised_lr=factor * step.rate,
        )

    def _bearable(self, step: Observation) -> float:
        """Return the largest of a few shares of the rate that a rehearsal survives."""
        for factor in (1 / 2, 1 / 4):
            found = step.rehearsals(factor)
            if found is None or found.rise <= self.soon:
                return factor
        return 1 / 8


def _left(step: Observation, found: Rehearsed, before: _Asked | None) -> str:
    """Say when the rate gets there, if it goes on to grow as it did."""
    if before is None or found.multiple <= 1 or not step.rate > before[1] > 0:
        return ""
    pace = math.log(step.rate / before[1]) / max(step.index - before[0], 1)
    return f"; it gets there in about {math.log(found.multiple) / pace:.0f} steps"
