"""Settings of the cap beside one another, over one half of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rescuing.outcomes import Outcomes, mean_loss, overhead, touched
from rescuing.report import table


def compare(found: Outcomes, policies: Sequence[str]) -> str:
    """Return a table: counts over all, then log10 of the loss over the tuned rate's."""
    multiples = sorted({o.run.multiple for o in found.all})
    high = [m for m in multiples if m > 1]
    rows = []
    for policy in policies:
        rescued = [found.rescued(policy, m) for m in high]
        lost = [found.diverged(policy, m) for m in high]
        own = [o for o in found.all if o.policy == policy]
        rows.append(
            (
                policy,
                f"{sum(k for k, _ in rescued)}/{sum(n for _, n in rescued)}",
                str(sum(k for k, _ in lost)),
                "{}/{}".format(*found.kept(policy)),
                "{}/{}".format(*found.not_slower(policy)),
                *(f"{_excess(found, policy, m):+.2f}" for m in multiples),
                f"{touched([o for o in own if o.run.multiple == 1]):.0%}",
                f"{overhead(own):.0%}",
            )
        )
    header = ("policy", "rescued", "lost", "x1 kept", "x.25 kept")
    header += tuple(f"x{m:g}" for m in multiples)
    return table((*header, "x1 touched", "overhead"), rows)


def _excess(found: Outcomes, policy: str, multiple: float) -> float:
    """Mean over cells of log10(loss / loss of the tuned rate)."""
    logs = []
    for setting, schedule in found.pairs():
        reference = found.reference(setting, schedule)
        cell = found.cell(policy, setting, schedule, multiple)
        if reference and cell:
            loss = min(mean_loss(cell), 10 * setting.rates.chance)
            logs.append(math.log10(max(loss, 1e-5) / max(reference.loss, 1e-5)))
    return sum(logs) / len(logs) if logs else math.nan
