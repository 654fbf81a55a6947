"""Whether the user's own learning rate is too high, told from how often a cap lowers it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from geomwatch.controllers.actuators import LR
from geomwatch.controllers.protocol import Move
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import GUESS, Documented, between, level


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseRateTest(Documented):
    """When `LearningRateCap` says that the user's own rate is too high."""

    window: int = level(100, "last measurements that count", source=GUESS)
    enough: int = level(30, "measurements before anything is said", source=GUESS)
    share: float = level(0.3, "share that lower the rate", source=GUESS, check=between(0, 1))


class BaseRate(Resumable):
    """Advises once, by how much to lower a base rate that many measurements find too high.

    The factor is the geometric mean of those by which measurements have lowered it.
    """

    _recent: Kept[deque[float]]  # scales at measurements
    _advised: Kept[bool]

    def __init__(self, test: BaseRateTest) -> None:
        self._test = test
        self._recent = deque(maxlen=test.window)
        self._advised = False

    def __call__(self, scale: float, largest: float) -> Sequence[Move]:
        """Take in by what factor a measurement scales the user's `largest` rate."""
        self._recent.append(min(1.0, scale))
        lowered = [scale for scale in self._recent if scale < 1]
        is_often = len(lowered) > self._test.share * len(self._recent)
        if self._advised or len(self._recent) < self._test.enough or not is_often:
            return ()
        self._advised = True
        k = math.exp(-math.fsum(map(math.log, lowered)) / len(lowered))
        reason = (
            f"your base rate is about {k:.2g} x too high: {len(lowered)} of the last "
            f"{len(self._recent)} measurements have lowered it"
        )
        return (Move(LR, largest / k, reason, advice=True),)
