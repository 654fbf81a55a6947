"""Runs compared over seeds and policies, and what the bars say of them.

The bars were fixed before the runs were looked at.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.policies import BASELINES
from harness.run import Setting
from harness.story import Story

RESCUED = 3.0  # times the tuned rate's loss,
UNHARMED = 1.1  # at the tuned rate itself,
SLOW = 1.01  # at a quarter of it
POINTS, OWN_POINTS = 0.015, 0.005  # of accuracy
Pair = tuple[Setting, str]  # a setting and a schedule
Count = tuple[int, int]  # so many of so many


@dataclass(frozen=True)
class Reference:
    """The tuned rate without control under the same schedule, over seeds."""

    loss: float
    sd: float
    accuracy: float

    def is_reached(self, story: Story) -> bool:
        """Tell whether a run from too high a rate counts as rescued."""
        limit = max(RESCUED * self.loss, self.loss + 2 * self.sd)
        close = story.accuracy >= self.accuracy - POINTS
        return not story.diverged and story.loss <= limit and close

    def is_kept(self, cell: Sequence[Story]) -> bool:
        """Tell whether runs at the tuned rate are as good with control, on average over seeds."""
        limit = max(UNHARMED * self.loss, self.loss + 2 * self.sd)
        return mean_loss(cell) <= limit and mean_accuracy(cell) >= self.accuracy - OWN_POINTS


class Cells:
    """Stories, to be asked for by policy, setting, schedule and multiple: a cell is its seeds."""

    def __init__(self, found: Iterable[Story]) -> None:
        self.all = list(found)
        self._cells: dict[tuple[str, Setting, str, float], list[Story]] = defaultdict(list)
        for s in self.all:
            self._cells[s.policy, s.run.setting, s.run.recipe.schedule, s.run.multiple].append(s)

    def cell(self, policy: str, pair: Pair, multiple: float) -> list[Story]:
        return self._cells.get((policy, *pair, multiple), [])

    def pairs(self) -> list[Pair]:
        """Return each setting with each of its schedules, in order."""
        return list(dict.fromkeys((s.run.setting, s.run.recipe.schedule) for s in self.all))

    def multiples(self, *policies: str) -> list[float]:
        """Return the multiples that were tried, under some policies or any."""
        own = (s for s in self.all if not policies or s.policy in policies)
        return sorted({s.run.multiple for s in own})

    def reference(self, pair: Pair) -> Reference | None:
        """Return what the tuned rate reaches by itself."""
        own = self.cell("none", pair, 1.0)
        if not own or any(not math.isfinite(s.loss) for s in own):
            return None
        losses = [s.loss for s in own]
        sd = statistics.stdev(losses) if len(losses) > 1 else 0.0
        return Reference(mean_loss(own), sd, mean_accuracy(own))

    def rescued(self, policy: str, multiple: float) -> Count:
        """Count the runs from a multiple that reach the tuned rate's, and all."""
        hits = total = 0
        for pair in self.pairs():
            reference = self.reference(pair)
            own = self.cell(policy, pair, multiple)
            total += len(own)
            hits += sum(reference is not None and reference.is_reached(s) for s in own)
        return hits, total

    def diverged(self, policy: str, multiple: float) -> Count:
        """Count the runs from a multiple that end no better than chance, and all."""
        own = [s for s in self.all if s.policy == policy and s.run.multiple == multiple]
        return sum(s.diverged for s in own), len(own)

    def kept(self, policy: str = "cap") -> Count:
        """Count the cells at the tuned rate that are as good with control, and all."""
        hits = total = 0
        for pair in self.pairs():
            reference = self.reference(pair)
            if cell := self.cell(policy, pair, 1.0):
                total += 1
                hits += reference is not None and reference.is_kept(cell)
        return hits, total

    def not_slower(self, policy: str = "cap") -> Count:
        """Count the cells at a quarter of the tuned rate whose mean loss is within 1 %, and all."""
        pairs = [(self.cell(policy, p, 0.25), self.cell("none", p, 0.25)) for p in self.pairs()]
        both = [(mean_loss(own), mean_loss(bare)) for own, bare in pairs if own and bare]
        return sum(own <= SLOW * bare for own, bare in both), len(both)

    def worse_than_a_baseline(self, policy: str = "cap") -> list[tuple[Setting, str, float]]:
        """List the cells in which a baseline has the lower mean loss on its seeds, by over 2 sd."""
        found = []
        for pair in self.pairs():
            reference = self.reference(pair)
            slack = 2 * reference.sd if reference else 0.0
            for multiple in (m for m in self.multiples() if m > 1):
                own = self.cell(policy, pair, multiple)
                others = (self.cell(b, pair, multiple) for b in BASELINES)
                if any(_is_beaten(own, other, slack) for other in others):
                    found.append((*pair, multiple))
        return found


def _is_beaten(own: Sequence[Story], other: Sequence[Story], slack: float) -> bool:
    seeds = {s.run.recipe.seed for s in other}
    same = [s for s in own if s.run.recipe.seed in seeds]
    return bool(same) and mean_loss(same) > mean_loss(other) + slack


def mean_loss(cell: Sequence[Story]) -> float:
    """Return the mean over seeds; infinite if one has ended in NaN."""
    return statistics.fmean(s.loss for s in cell)


def mean_accuracy(cell: Sequence[Story]) -> float:
    return statistics.fmean(s.accuracy for s in cell)


def touched(cell: Sequence[Story]) -> float:
    """Return the share of steps whose rate was lowered."""
    scales = [scale for s in cell for scale in s.scales]
    return sum(scale < 1 for scale in scales) / len(scales)


def overhead(cell: Sequence[Story]) -> float:
    """Return the wall time of the policy over that of the training."""
    seconds = [s.data["seconds"] for s in cell]
    return sum(s["policy"] for s in seconds) / sum(s["bare"] for s in seconds)
