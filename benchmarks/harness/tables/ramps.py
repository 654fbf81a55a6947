"""Detectors beside one another on learning-rate ramps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from harness.detectors import (
    DETECTORS,
    LOSS_AND_GRADIENT,
    Alarm,
    Detector,
    above,
    either,
    geomwatch,
    geomwatch_geometry,
    geomwatch_unplanned,
)
from harness.scoring import MOST_FALSE, Score, curve, failed, freeze, healthy, score
from harness.tables.writing import Sets, Stories, cost_of, overhead, table

_HEADER = (
    "detector",
    "threshold",
    "chosen on: false alarms",
    "recall",
    "held back: false alarms",
    "recall",
    "recall, >= 20 steps early",
    "median lead",
    "overhead",
)
WELL = ("ramp", "steady", "start")


def ramps(sets: Sets, *, adaptive: bool) -> str:
    """Compare detectors on learning-rate ramps of one family of optimizers."""
    some = sets.only(adaptive=adaptive, scenarios=WELL)
    return table(_HEADER, _ramp_rows(some))


def _ramp_rows(some: Sets) -> Iterator[Sequence[object]]:
    best: tuple[float, Detector, float] | None = None
    for detector in DETECTORS:
        threshold = freeze(detector, healthy(some.development))
        yield _row(detector.name, above(detector, threshold), some, f"{threshold:.3g}", detector)
        if detector in LOSS_AND_GRADIENT:
            found = ramp_score(above(detector, threshold), some.development)
            rank = found.recall.value, detector, threshold
            best = max(best or rank, rank, key=lambda r: r[0])
    yield _row("**geomwatch**", geomwatch, some, "its own")
    yield _row("geomwatch, of an unknown schedule", geomwatch_unplanned, some, "its own")
    yield _row("geomwatch, geometry alone", geomwatch_geometry, some, "its own")
    if best is not None:
        _, detector, threshold = best
        pair = either(geomwatch_geometry, above(detector, threshold))
        yield _row(f"geometry or {detector.name}", pair, some, f"{threshold:.3g}")


def _row(
    name: str, alarm: Alarm, some: Sets, threshold: str, detector: Detector | None = None
) -> Sequence[object]:
    chosen, held = ramp_score(alarm, some.development), ramp_score(alarm, some.validation)
    cost = overhead(some.validation) if detector is None else cost_of(detector, some.validation)
    return (
        name,
        threshold,
        f"{chosen.false.k}/{chosen.false.n}",
        f"{chosen.recall.k}/{chosen.recall.n}",
        held.false,
        held.recall,
        held.early,
        held.lead,
        cost,
    )


def ramp_score(alarm: Alarm, stories: Stories) -> Score:
    return score(alarm, healthy(stories), failed(stories, "ramp"))


def equal_false_alarms(sets: Sets, *, adaptive: bool) -> str:
    """Give each baseline the threshold that suits the validation set best, in hindsight."""
    held = sets.only(adaptive=adaptive, scenarios=WELL).validation
    well, ill = healthy(held), failed(held, "ramp")
    own = score(geomwatch, well, ill)
    allowed = max(own.false.value, MOST_FALSE) if well else 0.0
    rows = [
        (detector.name, f"{curve(detector, well, ill).recall_at(allowed):.2f}")
        for detector in DETECTORS
    ]
    rows.append(("**geomwatch** (levels fixed)", f"{own.recall.value:.2f}"))
    return table(("detector", f"recall at <= {allowed:.1%} false alarms"), rows)
