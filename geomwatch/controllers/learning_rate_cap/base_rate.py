"""Whether the user's own learning rate is too high, told from how often a cap lowers it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from geomwatch.controllers.actuators import LR
from geomwatch.controllers.protocol import Move

_WINDOW = 100  # measurements
_OFTEN = 0.3  # of them, with the rate lowered, say that the base rate is too high
_ENOUGH = 30  # measurements to say so from


class BaseRate:
    """Advises once, by how much to lower a base rate that most measurements find too high."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_WINDOW)  # scales at measurements
        self._advised = False

    def __call__(self, scale: float, largest: float) -> Sequence[Move]:
        """Take in by what factor a measurement scales the user's `largest` rate."""
        self._recent.append(min(1.0, scale))
        lowered = [scale for scale in self._recent if scale < 1]
        is_often = len(lowered) > _OFTEN * len(self._recent)
        if self._advised or len(self._recent) < _ENOUGH or not is_often:
            return ()
        self._advised = True
        k = math.exp(-math.fsum(map(math.log, lowered)) / len(lowered))
        reason = (
            f"your base rate is about {k:.2g} x too high: {len(lowered)} of the last "
            f"{len(self._recent)} measurements have lowered it"
        )
        return (Move(LR, largest / k, reason, advice=True),)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent scales, and whether the advice was given."""
        return {"recent": list(self._recent), "advised": self._advised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the scales."""
        self._recent = deque(state["recent"], maxlen=_WINDOW)
        self._advised = state["advised"]
