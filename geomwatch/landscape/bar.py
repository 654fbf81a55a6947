"""A progress bar on stderr, or whatever the caller wants to be told."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable
from typing import TypeAlias

Progress: TypeAlias = bool | Callable[[int, int], None]  # (points done, points in all)

_WIDTH, _PAUSE = 30, 0.2  # characters, seconds


def reporter(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Return a function of (done, total) that shows a bar, calls the caller's own, or is silent."""
    if callable(progress):
        return progress
    return _Bar(name) if progress else lambda done, total: None


class _Bar:
    def __init__(self, name: str) -> None:
        self._name = name
        self._start = self._shown = time.monotonic()
        self._first: int | None = None  # done before the clock started

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done
        if now - self._shown < _PAUSE and done < total:
            return
        self._shown = now
        fresh = done - self._first
        left = ""  # nothing is known of it before the first point
        if fresh > 0:
            seconds = round((now - self._start) / fresh * (total - done))
            left = f", {datetime.timedelta(seconds=seconds)} left"
        filled = "=" * round(_WIDTH * done / total)
        end = "\n" if done == total else " "
        sys.stderr.write(f"\r{self._name} [{filled:<{_WIDTH}}] {done}/{total}{left}{end}")
        sys.stderr.flush()
