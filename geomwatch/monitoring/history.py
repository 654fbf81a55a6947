"""What a run has said so far, bounded: the latest, and those with an extreme."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from geomwatch.records import Adjustment, Alert, Look, Record

T = TypeVar("T")


class Ring(list[T]):
    """A list that holds `most` entries: at each further one it drops the oldest without an extreme.

    Files and trackers hold all of them. A record takes some 2 kB, so that 10,000 take 20 MB.

    Args:
        extremes: the numbers of an entry; one with the least or the largest value of any is kept.
        most: how many are held; it can be set, as in `monitor.history.most = 100_000`.
    """

    def __init__(self, extremes: Callable[[T], Mapping[str, float]], *, most: int = 10_000) -> None:
        super().__init__()
        self.most = most
        self.dropped = 0
        self._numbers = extremes
        self._least: dict[str, tuple[float, T]] = {}
        self._largest: dict[str, tuple[float, T]] = {}

    def append(self, entry: T) -> None:
        """Add an entry, and drop one where there is no room."""
        super().append(entry)
        for name, value in self._numbers(entry).items():
            if math.isnan(value):
                continue
            if name not in self._least or value < self._least[name][0]:
                self._least[name] = value, entry
            if name not in self._largest or value > self._largest[name][0]:
                self._largest[name] = value, entry
        while len(self) > self.most:
            self._drop()

    def extend(self, entries: Iterable[T]) -> None:
        """Add some entries."""
        for entry in entries:
            self.append(entry)

    def _drop(self) -> None:
        kept = {id(e) for found in (self._least, self._largest) for _, e in found.values()}
        oldest = next((i for i, entry in enumerate(self) if id(entry) not in kept), 0)
        del self[oldest]
        self.dropped += 1


def of_record(record: Record) -> dict[str, float]:
    """Return what was measured by a probe, without what is held from before."""
    fresh = {name: e.value for name, e in record.estimates.items() if e.age == 0}
    return {name: value for name, value in fresh.items() if value is not None}


def of_look(look: Look) -> dict[str, float]:
    """Return the margin that was seen."""
    value = look.gradient_margin.value
    return {} if value is None else {"gradient_margin": value}


def of_alert(alert: Alert) -> dict[str, float]:
    """Return the value that a rule has found."""
    return {alert.rule: alert.value}


def of_adjustment(adjustment: Adjustment) -> dict[str, float]:
    """Return what a knob was turned to."""
    return {adjustment.knob: adjustment.after}
