"""Where records and alerts go: any callable that takes a line, a flat dict with a `kind`.

A line's `kind` is "run" (provenance, once), "record", "alert" or "adjustment"; `schema` is the
version of the format. Every line is plain JSON: a missing or non-finite value is null.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from geomwatch.errors import UsageTypeError
from geomwatch.parallel.ranks import is_first_rank
from geomwatch.records import SCHEMA, Adjustment, Alert, Estimate, Record, format_estimate

logger = logging.getLogger("geomwatch")
logger.addFilter(lambda said: is_first_rank() or getattr(said, "each_rank", False))

Line: TypeAlias = dict[str, Any]
Sink: TypeAlias = Callable[[Line], None]

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}
_IN_THE_LOG = (
    ("lambda_max", "λ_max"),
    ("stability_margin", "margin"),
    ("stochastic_margin", "stochastic margin"),
    ("trace", "trace"),
    ("grad_norm", "|g|"),
)


class JsonLines:
    """Appends each line to a file as JSON. No file stays open: a crash loses nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # wherever the program moves to

    def __call__(self, line: Line) -> None:
        """Append one line."""
        text = json.dumps(_plain(line), allow_nan=False, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


class Log:
    """Writes records at INFO and alerts at their own level to the logger "geomwatch"."""

    def __call__(self, line: Line) -> None:
        """Log one line."""
        name = f"{line['monitor']}: " if "monitor" in line else ""
        if line["kind"] == "record" and logger.isEnabledFor(logging.INFO):
            logger.info("%s%s", name, _sentence(line))
        elif line["kind"] == "alert":
            where = f"{name}step {line['step']}: "
            logger.log(_LEVELS[line["severity"]], "%s%s", where, line["message"])
        elif line["kind"] == "adjustment":
            level = logging.WARNING if line["effect"] == "advice" else logging.INFO
            logger.log(level, "%sstep %d: %s", name, line["step"], _turn(line))


def as_sinks(given: Sequence[Sink | str | Path] | Sink | str | Path) -> tuple[Sink, ...]:
    """Return sinks: a path is a JsonLines file, one sink or path will do.

    Raises:
        UsageTypeError: something is neither callable nor a path.
    """
    several = given if isinstance(given, list | tuple) else (given,)
    for sink in several:
        if isinstance(sink, type) or not (callable(sink) or isinstance(sink, str | Path)):
            shown = f"{sink.__name__}()" if isinstance(sink, type) else '"run.jsonl"'
            raise UsageTypeError(
                f"sinks must be callables that take a line, or paths of files, got {sink!r}. "
                f"Write sinks={shown}."
            )
    return tuple(JsonLines(s) if isinstance(s, str | Path) else s for s in several)


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


def _sentence(line: Line) -> str:
    parts = [f"step {line['step']}", f"loss {line['loss']:.4g}"]
    if line["lr"]:
        parts.append(f"lr {max(line['lr']):.3g}")
    for name, label in _IN_THE_LOG:
        found = line["estimates"].get(name)
        if found is not None and found["value"] is not None:
            age = f" (at step {line['step'] - found['age']})" if found["age"] else ""
            parts.append(f"{label} {format_estimate(Estimate(**found))}{age}")
    return "  ".join(parts)


def _turn(line: Line) -> str:
    verb = {"applied": "", "dry run": "would be ", "advice": "advice, not applied: "}
    turned = f"{line['knob']} {line['before']:.3g} -> {line['after']:.3g}"
    return f"{verb[line['effect']]}{turned}: {line['reason']}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
