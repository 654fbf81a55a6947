"""How the warnings do on many kinds of runs, beside another version of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.detectors import Alarm
from harness.scoring import EARLY, by_step_ten, failed, healthy, lead_of
from harness.stats import Share
from harness.story import Story
from harness.tables.writing import table

_TUNED = 1.01  # up to here a rate counts as the tuned one, which rounding may exceed


def summary(now: Sequence[Story], before: Sequence[Story], alarm: Alarm) -> str:
    """Show each figure on either set, and what another version of the rules does there."""
    figures: tuple[tuple[str, Callable[[Sequence[Story]], Share]], ...] = (
        ("healthy, up to the tuned rate: warned", lambda s: _warned(alarm, _cool(s))),
        ("healthy, above it: warned", lambda s: _warned(alarm, _hot(s))),
        ("too large from the start: by step 10", lambda s: by_step_ten(alarm, failed(s, "start"))),
        ("hidden ramps: announced", lambda s: _ahead(alarm, _ramps(s, hidden=True), 1)),
        (
            f"hidden ramps: {EARLY} steps ahead",
            lambda s: _ahead(alarm, _ramps(s, hidden=True), EARLY),
        ),
        ("other ramps: announced", lambda s: _ahead(alarm, _ramps(s, hidden=False), 1)),
    )
    parts = [p for p in ("development", "validation") if any(s.run.part == p for s in now)]
    sides = [("before", before)] * bool(before) + [("now", now)]
    rows = [
        [what, *(figure(_of(stories, part)) for part in parts for _, stories in sides)]
        for what, figure in figures
    ]
    header = ["", *(f"{part}, {side}" for part in parts for side, _ in sides)]
    return table(header, rows)


def by_kind(now: Sequence[Story], before: Sequence[Story], alarm: Alarm) -> str:
    """Show the same task by task, in counts."""
    rows = []
    sides = [before] * bool(before) + [now]
    for name in dict.fromkeys(s.run.task_name for s in now):
        own = [[s for s in side if s.run.task_name == name] for side in sides]
        kind = own[-1][0].run.task.kind
        cells = [f"{_warned(alarm, _cool(s)).k}/{len(_cool(s))}" for s in own]
        cells += [f"{_announced(alarm, s)}/{len(failed(s))}" for s in own]
        rows.append([name, kind, own[-1][0].run.part, *cells])
    labels = ["before", "now"][-len(sides) :]
    header = ["task", "kind", "set"]
    header += [f"{what}, {label}" for what in ("warned", "announced") for label in labels]
    return table(header, rows)


def _of(stories: Sequence[Story], part: str) -> list[Story]:
    return [s for s in stories if s.run.part == part]


def _cool(stories: Sequence[Story]) -> list[Story]:
    return [s for s in healthy(stories) if s.run.multiple <= _TUNED]


def _hot(stories: Sequence[Story]) -> list[Story]:
    return [s for s in healthy(stories) if s.run.multiple > _TUNED]


def _ramps(stories: Sequence[Story], *, hidden: bool) -> list[Story]:
    return [s for s in failed(stories, "ramp") if s.run.recipe.hidden == hidden]


def _warned(alarm: Alarm, stories: Sequence[Story]) -> Share:
    return Share(sum(alarm(s) is not None for s in stories), len(stories))


def _ahead(alarm: Alarm, stories: Sequence[Story], steps: int) -> Share:
    return Share(sum(lead_of(alarm, s) >= steps for s in stories), len(stories))


def _announced(alarm: Alarm, stories: Sequence[Story]) -> int:
    starts = failed(stories, "start")
    others = [s for s in failed(stories) if s not in starts]
    return by_step_ten(alarm, starts).k + sum(lead_of(alarm, s) > 0 for s in others)
