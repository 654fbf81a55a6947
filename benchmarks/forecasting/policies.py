"""What a user does with the monitor: passes its options, and perhaps follows its advice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forecasting.grid import Run

DEFAULT, ADVICE = "default", "advice"


@dataclass(frozen=True)
class Policy:
    """Options of the Monitor. Who `follows` lowers the rate as soon as an alert says so.

    A `partial` one is tried on the half that is reported, without jumps, full-batch descent and
    MiniLM: 25 s a run.
    """

    options: dict[str, Any] = field(default_factory=dict)
    follows: bool = False
    partial: bool = False
    costs: float = 0.3  # overhead to plan with; the real one is measured

    def concerns(self, run: Run) -> bool:
        """Tell whether the benchmark tries this policy on a run."""
        return not self.partial or (
            run.half == "held"
            and run.scenario in ("steady", "start", "ramp")
            and not run.task_name.startswith("minilm")
        )


POLICIES = {
    DEFAULT: Policy(),
    "2%": Policy({"max_overhead": 0.02}, partial=True, costs=0.02),
    "5%": Policy({"max_overhead": 0.05}, partial=True, costs=0.05),
    "10%": Policy({"max_overhead": 0.10}, partial=True, costs=0.10),
    # The default schedule would leave most of this budget unused.
    "100%": Policy({"max_overhead": 1.0, "every": 10}, partial=True, costs=1.0),
    ADVICE: Policy(follows=True),  # on runs that fail without it
}
BUDGETS = tuple(name for name, policy in POLICIES.items() if not policy.follows)
QUICK = (DEFAULT, "10%", ADVICE)
