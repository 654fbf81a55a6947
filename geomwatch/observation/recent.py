"""The mean of a few recent margins, at the learning rate of the day."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

from geomwatch.observation.step import Observation

_LEAST = 1e-3  # a margin below this, or of the wrong sign, counts as this in a geometric mean


class RecentMargins:
    """Margins divided by the learning rate they were measured at: one batch differs from the next.

    The last `most` are kept, and those of the last `steps` count.
    """

    def __init__(self, *, most: int, steps: int) -> None:
        self._steps = steps
        self._measured: deque[tuple[int, float]] = deque(maxlen=most)  # step, margin / lr

    def add(self, step: Observation, margin: float) -> None:
        """Add one that was measured at this step's rate; at a rate of 0 nothing is learnt."""
        lr = max(step.lr, default=1.0)
        if lr > 0:
            self._measured.append((step.index, margin / lr))

    def mean(self, step: Observation) -> tuple[float | None, int]:
        """Return the geometric mean at this step's rate, None if there is none, and the count."""
        lr = max(step.lr, default=1.0)
        recent = [lr * m for at, m in self._measured if step.index - at <= self._steps]
        if not recent:
            return None, 0
        return statistics.geometric_mean(max(m, _LEAST) for m in recent), len(recent)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements."""
        return {"measured": [list(pair) for pair in self._measured]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        pairs = ((int(step), float(m)) for step, m in state["measured"])
        self._measured = deque(pairs, maxlen=self._measured.maxlen)
