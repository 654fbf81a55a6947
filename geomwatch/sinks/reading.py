"""A file of lines, read back: what can be read of it, and what can't, by line and reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from geomwatch.records import SCHEMA, Adjustment, Alert, Look, Record
from geomwatch.sinks.lines import Line
from geomwatch.sinks.parsing import adjustment_of, alert_of, look_of, record_of

_START = b'{"kind": "'  # of each line; never inside a string, where quotes are escaped


@dataclass(frozen=True, slots=True)
class Lost:
    """A line of a file of which something could not be read: its number, from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a file of lines holds, in its order.

    A file that several runs were appended to, or one that was resumed, has a line for each in
    `runs`; those of a Group have one for each monitor, by its name in `monitors`. Of a run that was
    closed, `end` is its last line. Each record has the alerts and adjustments that came with it;
    all of them, also of the steps in between, are in `alerts` and `adjustments`.
    """

    runs: tuple[Mapping[str, Any], ...] = ()
    records: tuple[Record, ...] = ()
    looks: tuple[Look, ...] = ()
    alerts: tuple[Alert, ...] = ()
    adjustments: tuple[Adjustment, ...] = ()
    end: Mapping[str, Any] | None = None
    monitors: tuple[str, ...] = ()
    lost: tuple[Lost, ...] = ()

    @property
    def run(self) -> Mapping[str, Any]:
        """What the last run said of itself: versions, optimizer, options; empty if nothing."""
        return self.runs[-1] if self.runs else {}


def read(path: str | Path, *, monitor: str | None = None) -> Run:
    """Read the file that `sinks="run.jsonl"` has written, whole or damaged.

    A line is read for what it has: of a later version's the fields that are known here, of an
    earlier one's those that there were. What can't be read is in `Run.lost`; the next line that is
    whole is read again, also where it was glued to a torn one. What was not finite is NaN, but for
    `clip_norm`, where it is infinite: none. It takes the memory of what it returns.

    Args:
        path: the file.
        monitor: of a Group's file the lines of this monitor only.

    Raises:
        OSError: the file can't be opened or read.
    """
    reader = _Reader(monitor)
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            reader.take(number, raw)
    return reader.run()


@dataclass
class _Reader:
    wanted: str | None
    runs: list[Mapping[str, Any]] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    adjustments: list[Adjustment] = field(default_factory=list)
    end: Mapping[str, Any] | None = None
    monitors: dict[str, None] = field(default_factory=dict)
    lost: list[Lost] = field(default_factory=list)
    last: dict[str, int] = field(default_factory=dict)  # the last record of each monitor

    def take(self, number: int, raw: bytes) -> None:
        """Read one line of the file."""
        raw = raw.strip(b"\r\n\t \xef\xbb\xbf")
        if not raw:
            return
        try:
            try:
                self.add(_parsed(raw))
            except _ERRORS:
                start = raw.rfind(_START)
                if start <= 0:
                    raise
                self.add(_parsed(raw[start:]))
                self.lost.append(Lost(number, f"its first {start} bytes: torn off"))
        except _ERRORS as error:
            self.lost.append(Lost(number, _reason(error)))

    def add(self, line: Line) -> None:
        """Add what a line says."""
        kind, name = line.get("kind"), str(line.get("monitor", ""))
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"its kind is {kind!r:.40}, none that is known{_newer(line)}")
        if self.wanted is not None and name != self.wanted:
            self.monitors |= {name: None} if name else {}
            return
        try:
            _KINDS[kind](self, line, name)
        except _ERRORS as error:
            said = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"a line of kind {kind!r} can't be read: {said}{_newer(line)}"
            ) from error
        self.monitors |= {name: None} if name else {}

    def add_run(self, line: Line, name: str) -> None:
        self.runs.append({k: v for k, v in line.items() if k != "kind"})
        self.end = None
        self.last.pop(name, None)

    def add_end(self, line: Line, name: str) -> None:
        self.end = {k: v for k, v in line.items() if k != "kind"}

    def add_record(self, line: Line, name: str) -> None:
        self.records.append(record_of(line))
        self.last[name] = len(self.records) - 1

    def add_look(self, line: Line, name: str) -> None:
        self.looks.append(look_of(line))

    def add_alert(self, line: Line, name: str) -> None:
        alert = alert_of(line)
        self.alerts.append(alert)
        if (at := self.at(alert.step, name)) is not None:
            known = self.records[at]
            self.records[at] = replace(known, alerts=(*known.alerts, alert))

    def add_adjustment(self, line: Line, name: str) -> None:
        adjustment = adjustment_of(line)
        self.adjustments.append(adjustment)
        if (at := self.at(adjustment.step, name)) is not None:
            known = self.records[at]
            self.records[at] = replace(known, adjustments=(*known.adjustments, adjustment))

    def at(self, step: int, name: str) -> int | None:
        """Return where the record of this step is, if it is the monitor's last."""
        at = self.last.get(name)
        return at if at is not None and self.records[at].step == step else None

    def run(self) -> Run:
        """Return all of it."""
        return Run(
            runs=tuple(self.runs),
            records=tuple(self.records),
            looks=tuple(self.looks),
            alerts=tuple(self.alerts),
            adjustments=tuple(self.adjustments),
            end=self.end,
            monitors=tuple(self.monitors),
            lost=tuple(self.lost),
        )


_KINDS: dict[str, Callable[[_Reader, Line, str], None]] = {
    "run": _Reader.add_run,
    "record": _Reader.add_record,
    "look": _Reader.add_look,
    "alert": _Reader.add_alert,
    "adjustment": _Reader.add_adjustment,
    "end": _Reader.add_end,
}
# RecursionError: brackets in brackets; OverflowError: an integer that no float can hold
_ERRORS = (ValueError, KeyError, RecursionError, OverflowError)


def _parsed(raw: bytes) -> Line:
    line = json.loads(raw.decode("utf-8"))
    if not isinstance(line, dict):
        raise ValueError("it is JSON, but no line of a run")
    return line


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is no whole JSON: {error.msg} at character {error.pos + 1}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is no UTF-8 from byte {error.start + 1} on"
    return str(error) or type(error).__name__


def _newer(line: Line) -> str:
    schema = line.get("schema")
    if not isinstance(schema, int) or schema <= SCHEMA:
        return ""
    return f"; it is of schema {schema}, this version of geomwatch reads up to {SCHEMA}"
