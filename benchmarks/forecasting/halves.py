"""The runs by half, and how a table writes a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from forecasting.detectors import Detector
from forecasting.story import Story

Stories = Sequence[Story]


@dataclass(frozen=True)
class Halves:
    """All stories of one policy, by half."""

    tune: Stories
    held: Stories

    @classmethod
    def of(cls, stories: Iterable[Story]) -> Halves:
        kept = list(stories)
        return cls(
            [s for s in kept if s.run.half == "tune"], [s for s in kept if s.run.half == "held"]
        )

    def only(self, *, adaptive: bool, scenarios: Sequence[str]) -> Halves:
        """Keep one family of optimizers and some scenarios."""

        def wanted(story: Story) -> bool:
            return story.run.adaptive == adaptive and story.run.scenario in scenarios

        return Halves(list(filter(wanted, self.tune)), list(filter(wanted, self.held)))


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
