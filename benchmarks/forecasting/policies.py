"""What a user does with the monitor: passes its options, and perhaps follows its advice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULT, ADVICE = "default", "advice"


@dataclass(frozen=True)
class Policy:
    """Options of the Monitor. Who `follows` lowers the rate as soon as an alert says so."""

    options: dict[str, Any] = field(default_factory=dict)
    follows: bool = False
    costs: float = 0.3  # overhead to plan with; the real one is measured


POLICIES = {
    DEFAULT: Policy(),
    "2%": Policy({"max_overhead": 0.02}, costs=0.02),
    "5%": Policy({"max_overhead": 0.05}, costs=0.05),
    "10%": Policy({"max_overhead": 0.10}, costs=0.10),
    # The default schedule would leave most of this budget unused.
    "100%": Policy({"max_overhead": 1.0, "every": 10}, costs=1.0),
    ADVICE: Policy(follows=True),  # on runs that fail without it
}
BUDGETS = tuple(name for name, policy in POLICIES.items() if not policy.follows)
QUICK = (DEFAULT, "10%", ADVICE)
