"""One linear optimizer step with momentum on a coordinate, and when it is stable."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recursion:
    """One linear step with momentum on a coordinate w of curvature h.

    m' = memory m + intake h w,   w' = keep w - rate (direct h w + through m').

    Heavy ball: memory mu, intake 1 (1 - dampening), direct 0, through 1. Nesterov: direct 1,
    through mu. Adam with P frozen: memory b1, intake 1 - b1, direct 0, through 1; AdamW with keep
    1 - lr wd. Plain SGD: the defaults. AdEMAMix steps along a second, slow average of the gradient
    as well: `slow` times m_slow' = slow_memory m_slow + (1 - slow_memory) h w.
    """

    rate: float
    memory: float = 0.0
    intake: float = 0.0
    direct: float = 1.0
    through: float = 0.0
    keep: float = 1.0
    slow: float = 0.0
    slow_memory: float = 0.0

    @property
    def threshold(self) -> float:
        """The rate * h up to which it is stable: 0 if no rate is, inf if h does not enter.

        The characteristic polynomial is z^2 - T z + det with
        T = keep + memory - rate h (direct + through intake) and det = memory (keep - rate h
        direct). Jury's test fails first at z = -1, where 1 + T + det = 0 gives
        rate h = (1 + keep)(1 + memory) / (direct (1 + memory) + through intake). A slow average
        adds slow (1 - slow_memory) / (1 + slow_memory) to what z = -1 sees of the gradient.
        """
        push = self._push
        if self.memory >= 1 or self.keep <= -1 or push < 0:
            return 0.0
        return (1 + self.keep) * (1 + self.memory) / push if push else math.inf

    @property
    def limit_ratio(self) -> float:
        """The threshold over that of the small-batch limit.

        When the noise of small batches dominates (h -> 0 at a finite E[h^2]/E[h]) each kick is
        complete before the next one matters, so only its total size direct + through intake /
        (1 - memory) counts, and the limit is 2 over it: 2(1-mu) for heavy ball (Andreyev et al.
        2026, arXiv 2604.14108), 2 for Adam.
        """
        if not 0 < self.threshold < math.inf:
            return 1.0
        total = self.direct + self.through * self.intake / (1 - self.memory) + self.slow
        return self.threshold * total / 2

    @property
    def _push(self) -> float:
        slow = self.slow * (1 - self.slow_memory) / (1 + self.slow_memory)
        return (self.direct + slow) * (1 + self.memory) + self.through * self.intake
