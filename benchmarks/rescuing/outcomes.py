"""What came of each run, and what the bars say of it. Fixed before the runs were looked at."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rescuing.grid import Run, Setting
from rescuing.policies import BASELINES

DIVERGED = 0.9  # of what can be learnt is left: no better than chance
RESCUED = 3.0  # times the tuned rate's loss,
UNHARMED = 1.1  # at the tuned rate itself,
SLOW = 1.01  # at a quarter of it
POINTS, OWN_POINTS = 0.015, 0.005  # of accuracy


@dataclass(frozen=True)
class Outcome:
    """The end of a run: mean training loss of its last steps, accuracy on held-out data."""

    run: Run
    policy: str
    loss: float
    accuracy: float
    data: Mapping[str, Any]

    @classmethod
    def of(cls, run: Run, policy: str, data: Mapping[str, Any]) -> Outcome:
        loss = math.inf if data["tail"] is None else data["tail"]
        return cls(run, policy, loss, data["accuracy"], data)

    @property
    def diverged(self) -> bool:
        return not self.run.setting.rates.lost(self.loss) < DIVERGED


@dataclass(frozen=True)
class Reference:
    """The tuned rate without control under the same schedule, over seeds."""

    loss: float
    sd: float
    accuracy: float

    def is_reached(self, outcome: Outcome) -> bool:
        """Tell whether a run from too high a rate counts as rescued."""
        limit = max(RESCUED * self.loss, self.loss + 2 * self.sd)
        close = outcome.accuracy >= self.accuracy - POINTS
        return not outcome.diverged and outcome.loss <= limit and close

    def is_kept(self, cell: Sequence[Outcome]) -> bool:
        """Tell whether runs at the tuned rate are as good with control, on average over seeds."""
        limit = max(UNHARMED * self.loss, self.loss + 2 * self.sd)
        return mean_loss(cell) <= limit and mean_accuracy(cell) >= self.accuracy - OWN_POINTS


class Outcomes:
    """All outcomes, to be asked for by policy, setting, schedule and multiple."""

    def __init__(self, found: Iterable[Outcome]) -> None:
        self.all = list(found)
        self._cells: dict[tuple[str, Setting, str, float], list[Outcome]] = defaultdict(list)
        for o in self.all:
            self._cells[o.policy, o.run.setting, o.run.schedule, o.run.multiple].append(o)

    def cell(self, policy: str, setting: Setting, schedule: str, multiple: float) -> list[Outcome]:
        return self._cells.get((policy, setting, schedule, multiple), [])

    def reference(self, setting: Setting, schedule: str) -> Reference | None:
        """Return what the tuned rate reaches by itself."""
        own = self.cell("none", setting, schedule, 1.0)
        if not own or any(not math.isfinite(o.loss) for o in own):
            return None
        losses = [o.loss for o in own]
        sd = statistics.stdev(losses) if len(losses) > 1 else 0.0
        accuracy = statistics.fmean(o.accuracy for o in own)
        return Reference(statistics.fmean(losses), sd, accuracy)

    def pairs(self) -> list[tuple[Setting, str]]:
        """Return each setting with each of its schedules, in order."""
        return list(dict.fromkeys((o.run.setting, o.run.schedule) for o in self.all))

    def rescued(self, policy: str, multiple: float) -> tuple[int, int]:
        """Count the runs from a multiple that reach the tuned rate's, and all."""
        hits = total = 0
        for setting, schedule in self.pairs():
            reference = self.reference(setting, schedule)
            for outcome in self.cell(policy, setting, schedule, multiple):
                total += 1
                hits += reference is not None and reference.is_reached(outcome)
        return hits, total

    def diverged(self, policy: str, multiple: float) -> tuple[int, int]:
        """Count the runs from a multiple that end no better than chance, and all."""
        own = [o for o in self.all if o.policy == policy and o.run.multiple == multiple]
        return sum(o.diverged for o in own), len(own)

    def kept(self, policy: str = "cap") -> tuple[int, int]:
        """Count the cells at the tuned rate that are as good with control, and all."""
        hits = total = 0
        for setting, schedule in self.pairs():
            reference = self.reference(setting, schedule)
            if cell := self.cell(policy, setting, schedule, 1.0):
                total += 1
                hits += reference is not None and reference.is_kept(cell)
        return hits, total

    def not_slower(self, policy: str = "cap") -> tuple[int, int]:
        """Count the cells at a quarter of the tuned rate whose mean loss is within 1 %, and all."""
        hits = total = 0
        for setting, schedule in self.pairs():
            bare = self.cell("none", setting, schedule, 0.25)
            own = self.cell(policy, setting, schedule, 0.25)
            if bare and own:
                total += 1
                hits += mean_loss(own) <= SLOW * mean_loss(bare)
        return hits, total

    def worse_than_a_baseline(self, policy: str = "cap") -> list[tuple[Setting, str, float]]:
        """List the cells in which a baseline has the lower mean loss on its seeds, by over 2 sd."""
        found = []
        for setting, schedule in self.pairs():
            reference = self.reference(setting, schedule)
            slack = 2 * reference.sd if reference else 0.0
            for multiple in sorted({o.run.multiple for o in self.all if o.run.multiple > 1}):
                own = self.cell(policy, setting, schedule, multiple)
                others = (self.cell(b, setting, schedule, multiple) for b in BASELINES)
                if any(_is_beaten(own, other, slack) for other in others):
                    found.append((setting, schedule, multiple))
        return found


def _is_beaten(own: Sequence[Outcome], other: Sequence[Outcome], slack: float) -> bool:
    seeds = {o.run.seed for o in other}
    same = [o for o in own if o.run.seed in seeds]
    return bool(same) and mean_loss(same) > mean_loss(other) + slack


def mean_loss(cell: Sequence[Outcome]) -> float:
    """Return the mean over seeds; infinite if one has ended in NaN."""
    return statistics.fmean(o.loss for o in cell)


def mean_accuracy(cell: Sequence[Outcome]) -> float:
    return statistics.fmean(o.accuracy for o in cell)


def touched(cell: Sequence[Outcome]) -> float:
    """Return the share of steps whose rate was lowered."""
    scales = [s for o in cell for s in o.data["scales"]]
    return sum(s < 1 for s in scales) / len(scales)


def overhead(cell: Sequence[Outcome]) -> float:
    """Return the wall time of the policy over that of the training."""
    return sum(o.data["seconds"]["policy"] for o in cell) / sum(
        o.data["seconds"]["bare"] for o in cell
    )
