"""The lines of a run: what sinks are called with.

A line's `kind` is "run" (provenance, the first), "record", "alert", "adjustment" or "end" (the
last, of a run that was closed); `schema` is the version of the format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

from geomwatch.records import SCHEMA, Adjustment, Alert, Record

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
    }


def alert_line(alert: Alert) -> Line:
    """Return the line of an alert."""
    return {"kind": "alert", "schema": SCHEMA, **asdict(alert)}


def adjustment_line(adjustment: Adjustment) -> Line:
    """Return the line of an adjustment."""
    return {"kind": "adjustment", "schema": SCHEMA, **asdict(adjustment)}


def end_line(step: int, seconds: float, overhead: float | None) -> Line:
    """Return the line that ends a run: the steps counted, what watching took, lines lost."""
    return {
        "kind": "end",
        "schema": SCHEMA,
        "step": step,
        "seconds": seconds,
        "overhead": overhead,
        "lost": 0,
    }
