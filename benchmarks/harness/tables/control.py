"""What controllers and baselines do to runs from multiples of the tuned rate: bars and cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from geomwatch.controllers.actuators import BATCH
from harness.cells import Cells, Count, Pair, mean_accuracy, mean_loss, overhead, touched
from harness.policies import BASELINES, BATCHES, TUNED, named
from harness.story import Story
from harness.tables.writing import table

_ROWS = ("none", "cap", *BASELINES)
BySet = Mapping[str, Cells]


def bars(sets: BySet) -> str:
    """Show what was wanted and what was reached."""
    rows = []
    for name, cells in sets.items():
        high = _high(cells)
        rows += [
            (
                name,
                "x4 to x30: ends no better than chance",
                "none",
                _ratio(_sum(cells.diverged("cap", m) for m in high)),
            ),
            (
                name,
                "x4 to x30: rescued",
                ">= 95 %",
                _ratio(_sum(cells.rescued("cap", m) for m in high)),
            ),
            (name, "the tuned rate itself by that measure", "", _ratio(cells.rescued("none", 1.0))),
            (
                name,
                "cells in which a baseline is better",
                "none",
                len(cells.worse_than_a_baseline()),
            ),
            (name, "x1: cells whose loss and accuracy are kept", "all", _ratio(cells.kept())),
            (name, "x0.25: cells within 1 % of the loss", "all", _ratio(cells.not_slower())),
        ]
    return table(("set", "what", "bar", "reached"), rows)


def shares(sets: BySet, what: str) -> str:
    """Count by policy and multiple the runs that are "rescued" or have "diverged"."""
    parts = []
    for name, cells in sets.items():
        high, rows = _high(cells), []
        for policy in _ROWS:
            counts = [getattr(cells, what)(policy, m) for m in high]
            if any(total for _, total in counts):
                rows.append((named(policy).label, *map(_ratio, counts)))
        parts.append(table((name, *(f"x{m:g}" for m in high)), rows))
    return "\n\n".join(parts)


def costs(long: Cells) -> str:
    """Show the time that control takes of long runs."""
    rows = [
        (
            pair[0].label,
            f"x{m:g}",
            named(policy).label,
            pair[0].steps,
            _figures(cell),
            f"{overhead(cell):.1%}",
        )
        for pair in long.pairs()
        for m in long.multiples()
        for policy in ("none", "cap", "lean")
        if (cell := long.cell(policy, pair, m))
    ]
    header = ("task", "rate", "control", "steps", "loss / accuracy", "its time over training")
    return table(header, rows)


def full_batches(edge: Cells) -> str:
    """Show what the cap does at the edge of stability."""
    rows = []
    for pair in edge.pairs():
        for m in edge.multiples():
            bare, cell = edge.cell("none", pair, m), edge.cell("cap", pair, m)
            if cell and bare:
                lowest = min(min(s.scales) for s in cell)
                last = min(s.scales[-1] for s in cell)
                losses = f"{mean_loss(bare):.4g}", f"{mean_loss(cell):.4g}"
                rows.append((pair[0].label, f"x{m:g}", *losses, f"{lowest:.2f}", f"{last:.2f}"))
    header = ("task", "rate", "loss without", "with", "lowest scale", "scale at the end")
    return table(header, rows)


def batches(found: Cells) -> str:
    """Show what the scaler does to batches that are too small, and to full ones."""
    rows = []
    for setting, schedule in found.pairs():
        for m in sorted({s.run.multiple for s in found.all if s.run.setting == setting}):
            cells = [found.cell(p, (setting, schedule), m) for p in ("none", *BATCHES)]
            batch = "full" if setting.batch is None else setting.batch
            rate = f"{cells[1][0].run.recipe.rate:.3g}" if cells[1] else ""
            figures, moves = map(_figures, cells), map(_moves, cells[1:])
            rows.append((setting.label, batch, rate, *figures, *moves))
    header = ("task", "batch", "rate", "as it is", "scaler", "scaler and cap")
    return table((*header, "used by the scaler", "and with the cap"), rows)


def every_cell(sets: BySet) -> str:
    """Show loss and accuracy of everything."""
    return "\n\n".join(
        f"### {pair[0].label}, {pair[1]} ({name})\n\n{_cell(cells, pair)}"
        for name, cells in sets.items()
        for pair in cells.pairs()
    )


def settings(found: Cells, policies: Sequence[str]) -> str:
    """Compare settings: counts over all, then log10 of the loss over the tuned rate's."""
    multiples, high = found.multiples(), _high(found)
    rows = []
    for policy in policies:
        own = [s for s in found.all if s.policy == policy]
        lost, _ = _sum(found.diverged(policy, m) for m in high)
        rows.append(
            (
                policy,
                _ratio(_sum(found.rescued(policy, m) for m in high)),
                lost,
                _ratio(found.kept(policy)),
                _ratio(found.not_slower(policy)),
                *(f"{_excess(found, policy, m):+.2f}" for m in multiples),
                f"{touched([s for s in own if s.run.multiple == 1]):.0%}",
                f"{overhead(own):.0%}",
            )
        )
    header = ("policy", "rescued", "lost", "x1 kept", "x.25 kept", *(f"x{m:g}" for m in multiples))
    return table((*header, "x1 touched", "overhead"), rows)


def _cell(cells: Cells, pair: Pair) -> str:
    multiples, rows = _tried(cells), []
    for policy in _ROWS:
        own = [cells.cell(policy, pair, m) for m in multiples]
        if any(own):
            rows.append((named(policy).label, *map(_figures, own)))
    touches = [cells.cell("cap", pair, m) for m in multiples]
    rows.append(("steps lowered", *(f"{touched(c):.0%}" if c else "" for c in touches)))
    text = table((pair[0].label, *(f"x{m:g}" for m in multiples)), rows)
    tuned = [c for m in cells.multiples(TUNED) if (c := cells.cell(TUNED, pair, m))]
    if tuned:
        best = min(tuned, key=mean_loss)
        text += f"\n\n{named(TUNED).label} (x{best[0].run.multiple:g}): {_figures(best)}"
    return text


def _excess(found: Cells, policy: str, multiple: float) -> float:
    """Mean over cells of log10(loss / loss of the tuned rate)."""
    logs = []
    for pair in found.pairs():
        reference, cell = found.reference(pair), found.cell(policy, pair, multiple)
        if reference and cell:
            loss = min(mean_loss(cell), 10 * pair[0].rates.chance)
            logs.append(math.log10(max(loss, 1e-5) / max(reference.loss, 1e-5)))
    return sum(logs) / len(logs) if logs else math.nan


def _moves(cell: Sequence[Story]) -> str:
    moves = [a for s in cell for a in s.data["adjustments"]]
    used = sorted({scale for _, knob, scale in moves if knob == BATCH} | {1.0})
    return ", ".join(f"{scale:g}" for scale in used) if cell else ""


def _figures(cell: Sequence[Story]) -> str:
    if not cell:
        return ""
    loss = mean_loss(cell)
    return f"{loss:.3g} / {mean_accuracy(cell):.1%}" if math.isfinite(loss) else "NaN"


def _tried(cells: Cells) -> list[float]:
    return cells.multiples(*_ROWS)


def _high(cells: Cells) -> list[float]:
    return [m for m in _tried(cells) if m > 1]


def _sum(counts: Iterable[Count]) -> Count:
    pairs = list(counts)
    return sum(k for k, _ in pairs), sum(n for _, n in pairs)


def _ratio(count: Count) -> str:
    return f"{count[0]} of {count[1]}"
