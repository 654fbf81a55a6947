"""The stories by set, and how a table writes a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.detectors import Detector
from harness.story import Story

Stories = Sequence[Story]


@dataclass(frozen=True)
class Sets:
    """Stories by set: levels and thresholds are chosen on the one, figures are of the other."""

    development: Stories
    validation: Stories

    @classmethod
    def of(cls, stories: Iterable[Story]) -> Sets:
        kept = list(stories)
        parts = ([s for s in kept if s.run.part == p] for p in ("development", "validation"))
        return cls(*parts)

    @property
    def all(self) -> Stories:
        return [*self.development, *self.validation]

    def only(self, *, adaptive: bool, scenarios: Sequence[str]) -> Sets:
        """Keep one family of optimizers and some scenarios."""
        return Sets.of(
            s for s in self.all if s.run.adaptive == adaptive and s.run.scenario in scenarios
        )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def overhead(stories: Stories) -> str:
    """Write the median cost of the monitor, and that of its later probes alone."""
    if not stories:
        return "-"
    total = statistics.median(s.cost.total for s in stories)
    steady = statistics.median(s.cost.steady for s in stories)
    return f"{percent(total)} ({percent(steady)})"


def cost_of(detector: Detector, stories: Stories) -> str:
    if detector.pays == "probes":
        return overhead(stories)
    if detector.pays == "gradient norms" and stories:
        return percent(statistics.median(s.cost.grad_norms for s in stories))
    return "0"
