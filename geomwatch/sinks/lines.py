"""The lines of a run: what sinks are called with.

A line's `kind` is "run" (provenance, the first), "record", "look", "alert", "adjustment" or "end"
(the last, of a run that was closed); `schema` is the version of the format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from geomwatch.records import SCHEMA, Adjustment, Alert, Look, Record

Line: TypeAlias = dict[str, Any]
Sink: TypeAlias = Callable[[Line], None]


def run_line(facts: Mapping[str, Any]) -> Line:
    """Return the line that says what ran: versions, optimizer, options."""
    return {"kind": "run", "schema": SCHEMA, **facts}


def record_line(record: Record) -> Line:
    """Return the line of a record; its alerts have lines of their own."""
    return {
        "kind": "record",
        "schema": SCHEMA,
        "step": record.step,
        "loss": record.loss,
        "lr": record.lr,
        "seconds": record.seconds,
        "estimates": {name: asdict(e) for name, e in record.estimates.items()},
        "provenance": dict(record.provenance),
        "knobs": dict(record.knobs),
        "overhead": record.overhead,
    }


def look_line(look: Look) -> Line:
    """Return the line of a look along a step."""
    return {"kind": "look", "schema": SCHEMA, **asdict(look)}


def alert_line(alert: Alert) -> Line:
    """Return the line of an alert."""
    return {"kind": "alert", "schema": SCHEMA, **asdict(alert)}


def adjustment_line(adjustment: Adjustment) -> Line:
    """Return the line of an adjustment."""
    return {"kind": "adjustment", "schema": SCHEMA, **asdict(adjustment)}


def end_line(
    step: int,
    seconds: float,
    overhead: float | None,
    *,
    records: Sequence[Record] = (),
    alerts: Sequence[Alert] = (),
    lr: tuple[float, ...] = (),
) -> Line:
    """Return the line that ends a run: the steps counted, what watching took, lines lost.

    Also what was raised by severity, the last alert, the lowest rate that was advised, whether the
    last step was taken at one as low, and the last margin.
    """
    advised = min((a.advised_lr for a in alerts if a.advised_lr is not None), default=None)
    margins = [r.estimates.get("stability_margin") for r in records]
    known = [m.value for m in margins if m is not None and m.value is not None]
    return {
        "kind": "end",
        "schema": SCHEMA,
        "step": step,
        "records": len(records),
        "alerts": dict(Counter(alert.severity for alert in alerts)),
        "last_alert": alerts[-1].step if alerts else None,
        "advised_lr": advised,
        "lr": max(lr, default=None),
        "followed": None if advised is None or not lr else max(lr) <= _ROUNDED * advised,
        "margin": known[-1] if known else None,
        "seconds": seconds,
        "overhead": overhead,
        "lost": 0,
    }


_ROUNDED = 1.05  # a rate is advised with two digits
