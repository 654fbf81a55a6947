"""Lines turned back into records, alerts and adjustments, whatever version wrote them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from geomwatch.records import Adjustment, Alert, Estimate, Look, Record
from geomwatch.sinks.lines import Line

_ESTIMATE = tuple(f.name for f in fields(Estimate))


def record_of(line: Line) -> Record:
    """Return the record that a line is of.

    Raises:
        ValueError: something in it is of another kind.
        KeyError: it has no step.
    """
    provenance = line.get("provenance", line.get("how", {}))  # `how` in schema 1 of 0.1
    return Record(
        step=_integer(line["step"], "step"),
        loss=_float(line.get("loss"), "loss"),
        lr=tuple(_float(rate, "lr") for rate in _list(line.get("lr", ()), "lr")),
        seconds=_float(line.get("seconds"), "seconds"),
        estimates={
            name: _estimate(found, name)
            for name, found in _mapping(line.get("estimates", {}), "estimates").items()
        },
        provenance=_mapping(provenance, "provenance"),
        knobs={
            knob: _setting(value, knob)
            for knob, value in _mapping(line.get("knobs", {}), "knobs").items()
        },
        overhead=_share(line.get("overhead")),
    )


def _share(found: object) -> float | None:
    return None if found is None else _float(found, "overhead")


def _estimate(found: object, name: str) -> Estimate:
    known = {k: v for k, v in _mapping(found, name).items() if k in _ESTIMATE}
    for key in ("value", "error"):
        if known.get(key) is not None:
            known[key] = _float(known[key], f"{key} of {name}")
    for key in ("hvps", "age"):
        known[key] = _integer(known.get(key, 0), f"{key} of {name}")
    for key in ("error_kind", "status", "reason"):
        if not isinstance(known.get(key, ""), str):
            raise ValueError(f"{key} of {name} is {known[key]!r:.40}, no text")
    return Estimate(**{"value": None, **known})


def alert_of(line: Line) -> Alert:
    """Return the alert that a line is of; raises as `record_of` does."""
    advised = line.get("advised_lr")
    return Alert(
        rule=_text(line["rule"], "rule"),
        severity=_text(line["severity"], "severity"),  # type: ignore[arg-type]
        message=_text(line.get("message", ""), "message"),
        value=_float(line.get("value"), "value"),
        limit=_float(line.get("limit"), "limit"),
        step=_integer(line["step"], "step"),
        layers=tuple(_text(one, "layers") for one in _list(line.get("layers", ()), "layers")),
        advised_lr=None if advised is None else _float(advised, "advised_lr"),
    )


def look_of(line: Line) -> Look:
    """Return the look that a line is of; raises as `record_of` does."""
    numbers = ("limit", "update_ratio", "overhead", "loss")
    known = {n: _float(line[n], n) for n in numbers if line.get(n) is not None}
    return Look(
        step=_integer(line["step"], "step"),
        lr=_float(line.get("lr"), "lr"),
        gradient_margin=_estimate(line["gradient_margin"], "gradient_margin"),
        severity=_text(line.get("severity", ""), "severity"),
        **known,
    )


def adjustment_of(line: Line) -> Adjustment:
    """Return the adjustment that a line is of; raises as `record_of` does."""
    knob = _text(line["knob"], "knob")
    return Adjustment(
        knob=knob,
        before=_setting(line.get("before"), knob),
        after=_setting(line.get("after"), knob),
        reason=_text(line.get("reason", ""), "reason"),
        step=_integer(line.get("step", 0), "step"),
        effect=_text(line.get("effect", "applied"), "effect"),  # type: ignore[arg-type]
    )


def _setting(value: object, knob: str) -> float:
    """Return what a knob is set to; a norm that is clipped at none is infinite, null in a file."""
    return math.inf if value is None and knob == "clip_norm" else _float(value, knob)


def _float(value: object, name: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r:.40}, no number")
    return float(value)


def _integer(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r:.40}, no integer")
    return value


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.40}, no text")
    return value


def _list(value: object, name: str) -> Iterable[Any]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is {value!r:.40}, no list")
    return value


def _mapping(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {value!r:.40}, no object")
    return value
