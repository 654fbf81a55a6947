"""What became of a run, in a sentence, and of each alert: what it advised, and what was done."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from geomwatch.records import Alert, gravest
from geomwatch.sinks.reading import Run

_ROUNDED = 1.05  # a rate is advised with two digits


@dataclass(frozen=True, slots=True)
class Followed:
    """An alert, and whether its advice was followed: from which step on, None for never."""

    alert: Alert
    since: int | None

    @property
    def words(self) -> str:
        """Say so."""
        if self.alert.advised_lr is None:
            return "no rate advised"
        if self.since is None:
            return f"no: never down to {self.alert.advised_lr:.2g}"
        return f"yes, from step {self.since} on"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gravest severity of a run, "" for none, and a sentence."""

    severity: str
    sentence: str
    followed: tuple[Followed, ...]


def verdict_of(run: Run) -> Verdict:
    """Judge a run by its alerts."""
    rates = rates_of(run)
    followed = tuple(_followed(alert, rates) for alert in run.alerts)
    worst = gravest(alert.severity for alert in run.alerts)
    return Verdict(worst, _sentence(run, followed, worst), followed)


def rates_of(run: Run) -> list[tuple[int, float]]:
    """Return the rates that steps were taken at, by step."""
    known = {r.step: max(r.lr) * r.knobs.get("lr_scale", 1.0) for r in run.records if r.lr}
    known |= {look.step: look.lr for look in run.looks}
    return sorted(known.items())


def last_step(run: Run) -> int:
    """Return the last step that a file speaks of."""
    steps = [r.step for r in run.records] + [look.step for look in run.looks]
    steps += [a.step for a in run.alerts] + [a.step for a in run.adjustments]
    end = (run.end or {}).get("step")
    return max([*steps, end if isinstance(end, int) else 0])


def _followed(alert: Alert, rates: list[tuple[int, float]]) -> Followed:
    if alert.advised_lr is None:
        return Followed(alert, None)
    low = (s for s, rate in rates if s > alert.step and rate <= _ROUNDED * alert.advised_lr)
    return Followed(alert, next(low, None))


def _sentence(run: Run, followed: tuple[Followed, ...], worst: str) -> str:
    steps = last_step(run)
    if not run.records and not run.looks and not run.alerts:
        return "Nothing was recorded: the file holds no probe, no look and no alert."
    watched = f"{steps:,} steps, {len(run.records):,} probes, {len(run.looks):,} looks"
    margins = [
        e.value
        for r in run.records
        if (e := r.estimates.get("stability_margin")) is not None and e.value is not None
    ]
    highest = max((m for m in margins if math.isfinite(m)), default=None)
    of_margin = "" if highest is None else f" The stability margin was at most {highest:.2g} of 1."
    if worst in ("", "info"):
        return f"Healthy: {watched}, no warning.{of_margin}"
    counts = Counter(f.alert.severity for f in followed)
    kinds = " and ".join(f"{counts[k]} {k}" for k in ("critical", "warning") if counts[k])
    first = next(f.alert for f in followed if f.alert.severity in ("warning", "critical"))
    text = f"Trouble: {watched}, {kinds}. The first was {first.rule} at step {first.step}."
    advised = [f for f in followed if f.alert.advised_lr is not None]
    if not advised:
        return text
    lowest = min(advised, key=lambda f: f.alert.advised_lr or math.inf)
    done = "followed" if lowest.since is not None else "not followed"
    return f"{text} A learning rate of {lowest.alert.advised_lr:.2g} was advised, and {done}."
