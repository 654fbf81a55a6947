"""Detectors beside one another on learning-rate ramps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from forecasting.detectors import (
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
from forecasting.halves import Halves, Stories, cost_of, overhead, table
from forecasting.scoring import MOST_FALSE, Score, curve, failed, freeze, healthy, score

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


def ramps(halves: Halves, *, adaptive: bool) -> str:
    """Compare detectors on learning-rate ramps of one family of optimizers."""
    some = halves.only(adaptive=adaptive, scenarios=WELL)
    return table(_HEADER, _ramp_rows(some))


def _ramp_rows(some: Halves) -> Iterator[Sequence[object]]:
    best: tuple[float, Detector, float] | None = None
    for detector in DETECTORS:
        threshold = freeze(detector, healthy(some.tune))
        yield _row(detector.name, above(detector, threshold), some, f"{threshold:.3g}", detector)
        if detector in LOSS_AND_GRADIENT:
            found = ramp_score(above(detector, threshold), some.tune)
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
    name: str, alarm: Alarm, some: Halves, threshold: str, detector: Detector | None = None
) -> Sequence[object]:
    tune, held = ramp_score(alarm, some.tune), ramp_score(alarm, some.held)
    cost = overhead(some.held) if detector is None else cost_of(detector, some.held)
    return (
        name,
        threshold,
        f"{tune.false.k}/{tune.false.n}",
        f"{tune.recall.k}/{tune.recall.n}",
        held.false,
        held.recall,
        held.early,
        held.lead,
        cost,
    )


def ramp_score(alarm: Alarm, stories: Stories) -> Score:
    return score(alarm, healthy(stories), failed(stories, "ramp"))


def equal_false_alarms(halves: Halves, *, adaptive: bool) -> str:
    """Give each baseline the threshold that suits the held-back half best, in hindsight."""
    held = halves.only(adaptive=adaptive, scenarios=WELL).held
    well, ill = healthy(held), failed(held, "ramp")
    own = score(geomwatch, well, ill)
    allowed = max(own.false.value, MOST_FALSE) if well else 0.0
    rows = [
        (detector.name, f"{curve(detector, well, ill).recall_at(allowed):.2f}")
        for detector in DETECTORS
    ]
    rows.append(("**geomwatch** (levels fixed)", f"{own.recall.value:.2f}"))
    return table(("detector", f"recall at <= {allowed:.1%} false alarms"), rows)
