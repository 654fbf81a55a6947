"""What runs there are, how geomwatch does on each task, and what a larger budget buys."""

from __future__ import annotations

from harness.detectors import geomwatch
from harness.policies import POLICIES
from harness.scoring import by_step_ten, failed, healthy, score
from harness.stats import Share
from harness.tables.ramps import WELL, ramp_score
from harness.tables.writing import Sets, overhead, table


def by_task(sets: Sets) -> str:
    """Show geomwatch's score on each task."""
    rows = []
    for name in dict.fromkeys(s.run.task_name for s in sets.all):
        for adaptive in (False, True):
            own = [s for s in sets.all if s.run.task_name == name and s.run.adaptive == adaptive]
            if not own:
                continue
            found = score(geomwatch, healthy(own), failed(own, "ramp"))
            rows.append(
                (
                    name,
                    own[0].run.part,
                    "Adam family" if adaptive else "SGD",
                    f"{found.false.k}/{found.false.n}",
                    f"{found.recall.k}/{found.recall.n}",
                    found.lead,
                    by_step_ten(geomwatch, failed(own, "start")),
                    overhead(own),
                )
            )
    header = (
        "task",
        "set",
        "optimizer",
        "false alarms",
        "ramps announced",
        "median lead",
        "too large from the start, by step 10",
        "overhead",
    )
    return table(header, rows)


def budgets(by_policy: dict[str, Sets]) -> str:
    """Show what a smaller or larger budget for probes does, on the validation set.

    Over the runs that were done with each of the budgets.
    """
    rows = []
    by_policy = {name: sets for name, sets in by_policy.items() if sets.validation}
    names = [{s.run.name for s in sets.validation} for sets in by_policy.values()]
    everywhere = set.intersection(*names) if names else set()
    for policy, stories in by_policy.items():
        held = [s for s in stories.validation if s.run.name in everywhere]
        if not held:
            continue
        row: list[object] = [policy, f"`{POLICIES[policy].options or 'defaults'}`", overhead(held)]
        for adaptive in (False, True):
            some = Sets([], held).only(adaptive=adaptive, scenarios=WELL).validation
            found = ramp_score(geomwatch, some)
            row += [found.recall, found.lead]
        row += [
            by_step_ten(geomwatch, failed(held, "start")),
            Share(sum(geomwatch(s) is not None for s in healthy(held)), len(healthy(held))),
        ]
        rows.append(row)
    header = (
        "budget",
        "options",
        "measured overhead",
        "SGD ramps",
        "lead",
        "Adam ramps",
        "lead",
        "from the start, by step 10",
        "false alarms",
    )
    return table(header, rows)


def census(sets: Sets) -> str:
    """Count runs by scenario, set and outcome."""
    rows = []
    for part, stories in (("development", sets.development), ("validation", sets.validation)):
        for scenario in ("steady", "start", "ramp", "jump", "edge"):
            own = [s.outcome.label for s in stories if s.run.scenario == scenario]
            counts = [own.count(label) for label in ("healthy", "failed", "excluded")]
            rows.append((part, scenario, *counts))
    return table(("set", "scenario", "healthy", "failed", "excluded"), rows)


def false_alarms(sets: Sets) -> str:
    """Show how hot the healthy runs are that have a warning."""
    rows = []
    for name, low, high in (("up to 1 x", 0, 1.01), ("1 to 4 x", 1.01, 4.01), ("more", 4.01, 1e9)):
        row: list[object] = [name]
        for stories in (sets.development, sets.validation):
            own = [s for s in healthy(stories) if low <= s.run.multiple < high]
            row.append(Share(sum(geomwatch(s) is not None for s in own), len(own)))
        rows.append(row)
    header = ("largest rate, in units of the tuned one", "chosen on: healthy, warned", "held back")
    return table(header, rows)
