"""Rates too large from the start, sudden jumps, the edge of stability, and advice followed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from harness.detectors import (
    DETECTORS,
    Alarm,
    above,
    first_alert,
    geomwatch,
    geomwatch_geometry,
)
from harness.outcome import HEALTHY
from harness.scoring import before_end, by_step_ten, failed, freeze, healthy
from harness.stats import Share
from harness.story import Story
from harness.tables.writing import Sets, Stories, overhead, table


def starts(sets: Sets) -> str:
    """Count the runs that are bad from the start and announced by step 10."""
    rows = []
    for name, alarm in (
        ("**geomwatch**", geomwatch),
        ("geomwatch, geometry alone", geomwatch_geometry),
        *_frozen(sets),
    ):
        chosen = by_step_ten(alarm, failed(sets.development, "start"))
        held = by_step_ten(alarm, failed(sets.validation, "start"))
        later = before_end(alarm, failed(sets.validation, "start"))
        well = [s for s in healthy(sets.validation) if s.run.scenario in ("start", "steady")]
        false = Share(sum(alarm(s) is not None for s in well), len(well))
        rows.append((name, f"{chosen.k}/{chosen.n}", held, later, false))
    header = (
        "detector",
        "chosen on: by step 10",
        "held back: by step 10",
        "or before it blows up",
        "false alarms",
    )
    return table(header, rows)


def _frozen(sets: Sets) -> Iterator[tuple[str, Alarm]]:
    well = [s for s in healthy(sets.development) if s.run.scenario != "jump"]
    for detector in DETECTORS:
        yield detector.name, above(detector, freeze(detector, well))


def jumps(sets: Sets) -> str:
    """Count critical alerts before the step that applies a larger rate."""
    rows = []
    for name, stories in (("chosen on", sets.development), ("held back", sets.validation)):
        own = [s for s in stories if s.run.scenario == "jump"]
        ill = [s for s in own if s.outcome.label == "failed"]
        well = [s for s in own if s.outcome.label == "healthy"]
        rows.append((name, _before_jump(ill), _before_jump(well), overhead(own)))
    header = ("set", "jumps that fail, announced", "harmless jumps, announced", "overhead")
    return table(header, rows)


def _before_jump(stories: Stories) -> Share:
    return Share(sum(_is_before_jump(s) for s in stories), len(stories))


def _is_before_jump(story: Story) -> bool:
    raised = first_alert(story, severities=("critical",))
    jump = story.run.recipe.jump_step
    return raised is not None and jump is not None and raised <= jump


def edges(sets: Sets) -> str:
    """Count steps at the edge, warnings (there should be none) and the state "edge"."""
    rows = []
    for story in sets.all:
        if story.run.scenario != "edge":
            continue
        margins = [m for t, m in sorted(story.measured("stability_margin").items()) if t >= 50]
        loud = first_alert(story, severities=("warning", "critical"))
        quiet = first_alert(story, severities=("info",))
        middle = f"{statistics.median(margins):.2f}" if margins else "-"
        rows.append(
            (
                story.run.name,
                story.outcome.label,
                len(story.losses),
                middle,
                "none" if loud is None else f"step {loud}",
                "-" if quiet is None else f"step {quiet}",
            )
        )
    header = ("run", "outcome", "steps", "median margin from step 50", "warning", "edge")
    return table(header, rows)


def advice(default: Sets, followed: Sets) -> str:
    """Count the failing runs that train when the rate goes down to what the alerts say."""
    rows = []
    for part in ("development", "validation"):
        by_name = {s.run.name: s for s in getattr(followed, part)}
        for scenario in ("start", "ramp", "jump"):
            ill = failed(getattr(default, part), scenario)
            again = [by_name[s.run.name] for s in ill if s.run.name in by_name]
            advised = [s for s in again if s.data["caps"]]
            rows.append(
                (
                    part,
                    scenario,
                    Share(len(advised), len(again)),
                    Share(sum(_trains(s) for s in again), len(again)),
                    Share(sum(_trains(s) for s in advised), len(advised)),
                )
            )
    header = ("set", "scenario", "with advice", "of all, train", "of those with advice, train")
    return table(header, rows)


def _trains(story: Story) -> bool:
    return story.left < HEALTHY
