"""What a rule lets wait: losses and norms of which it has nothing to say at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from geomwatch.observation.findings import Present
from geomwatch.observation.step import Settled

Between: TypeAlias = tuple[float, float]  # both ends excluded
Waited: TypeAlias = Sequence[tuple[Settled, Present]]  # each step with the one before it

NONE: Between = (math.inf, -math.inf)
FINITE: Between = (-math.inf, math.inf)


@dataclass(frozen=True, slots=True)
class Calm:
    """Losses and gradient norms between which steps may wait until they are shown to a rule."""

    most: ClassVar[int] = 10  # steps that wait

    losses: Between = FINITE
    norms: Between = FINITE

    def holds(self, loss: float | None, norm: float | None) -> bool:
        """Tell whether a step, as far as it is known, may wait."""
        if loss is not None and not self.losses[0] < loss < self.losses[1]:
            return False
        return norm is None or self.norms[0] < norm < self.norms[1]


def all_calm(each: Sequence[Calm]) -> Calm:
    """Return what all let wait."""
    losses, norms = [c.losses for c in each], [c.norms for c in each]
    return Calm(_common(losses), _common(norms))


def _common(each: Sequence[Between]) -> Between:
    low = max((low for low, _ in each), default=-math.inf)
    return low, min((high for _, high in each), default=math.inf)
