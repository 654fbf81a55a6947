"""How much curvature along the steps healthy runs have, by batch and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from geomwatch.observation.documented import GUESS, Documented, level
from geomwatch.observation.step import Observation

ITEMS = 64  # the batch that levels are given for: the largest of the runs they were chosen on
_RATIO = 19.0  # its limit_ratio: theirs all had a momentum of 0.9, (1 + 0.9) / (1 - 0.9)


@dataclass(frozen=True, kw_only=True, repr=False)
class GradientLevels(Documented):
    """Levels of the gradient margin G, in units of the limit of small batches.

    A level for 64 items grows with the batch B as (B / 64)^power, and with momentum as the root of
    `limit_ratio` over 19; none lies beyond `edge` times the limit of the full batch, or below as
    many times that of small ones. Where every step sees the same data it is the former.
    """

    sgd: float = level(7.0, "gradient margin of SGD, long mean", source="decision 020")
    adaptive: float = level(12.0, "the same of methods that adapt", source="decision 020")
    power: float = level(1 / 3, "power of the batch that levels grow with", source="decision 014")
    quiet: float = level(2.5, "times higher where batches agree", source="decision 018: five GPTs")
    edge: float = level(1.3, "highest level, in full-batch limits", source=GUESS)

    def at(self, step: Observation, at_64: float | None = None, *, is_quiet: bool = False) -> float:
        """Return a level for this batch and this optimizer.

        Args:
            step: the coming one.
            at_64: the level for 64 items and a momentum of 0.9; by default that of the long mean.
            is_quiet: batch noise is known to matter hardly at all.
        """
        edge = self.edge * step.limit_ratio
        if step.same_data:
            return edge
        if at_64 is None:
            at_64 = self.adaptive if step.adaptive else self.sgd
        at_64 *= self.quiet if is_quiet else 1.0
        found = at_64 * (items_of(step) / ITEMS) ** self.power
        found *= math.sqrt(step.limit_ratio / _RATIO)
        return float(min(max(found, self.edge), edge))


GRADIENT = GradientLevels()


def items_of(step: Observation) -> int:
    """Return the batch last measured on."""
    return step.items or ITEMS
