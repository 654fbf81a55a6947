"""The report in Markdown: the bars, then every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rescuing.grid import Setting
from rescuing.outcomes import (
    Outcomes,
    mean_accuracy,
    mean_loss,
    overhead,
    touched,
)
from rescuing.policies import BASELINES, NAMES

_ROWS = ("none", "cap", *BASELINES)


def write(halves: dict[str, Outcomes], extras: dict[str, Outcomes], *, note: str) -> str:
    """Write the whole report."""
    count = sum(len(half.all) for half in (*halves.values(), *extras.values()))
    return f"""# Rescuing runs whose learning rate is too high

Written by `benchmarks/rescue.py` from {count} trainings. {note}

Each run starts from a multiple of the rate that trains its task best at a constant rate, found
beforehand (`benchmarks/tasks/rates.json`); schedules are multiplied as a whole. The settings of
`LearningRateCap` were chosen on one half of the tasks ("tune"); the other half ("held") has other
architectures and seeds. Monitor and controller run with their defaults. Loss is the mean training
loss of the last 20 steps, accuracy is on held-out data; both are means over seeds. What people use
instead was tried on one seed of the large nets, and is compared on that one.

## Bars

{_bars(halves)}

## Rescued

Runs that end within max(3 x the tuned rate's loss, it + 2 standard deviations over seeds), and
within 1.5 points of its accuracy:

{_shares(halves, "rescued")}

Runs that end no better than chance:

{_shares(halves, "diverged")}

![Final loss by multiple](rescue.png)

{_extras(extras)}
## Every cell

{_cells(halves)}
"""


def _bars(halves: dict[str, Outcomes]) -> str:
    rows = []
    for name, half in halves.items():
        high = [m for m in _multiples(half) if m > 1]
        lost = _sum(half.diverged("cap", m) for m in high)
        rescued = _sum(half.rescued("cap", m) for m in high)
        worse = half.worse_than_a_baseline()
        rows += [
            (name, "x4 to x30: ends no better than chance", "none", _ratio(lost)),
            (name, "x4 to x30: rescued", ">= 95 %", _ratio(rescued)),
            (name, "the tuned rate itself by that measure", "", _ratio(half.rescued("none", 1.0))),
            (name, "cells in which a baseline is better", "none", str(len(worse))),
            (name, "x1: cells whose loss and accuracy are kept", "all", _ratio(half.kept())),
            (name, "x0.25: cells within 1 % of the loss", "all", _ratio(half.not_slower())),
        ]
    return table(("half", "what", "bar", "reached"), rows)


def _shares(halves: dict[str, Outcomes], what: str) -> str:
    parts = []
    for name, half in halves.items():
        high = [m for m in _multiples(half) if m > 1]
        rows = []
        for policy in _ROWS:
            counts = [getattr(half, what)(policy, m) for m in high]
            if any(total for _, total in counts):
                rows.append((NAMES[policy], *map(_ratio, counts)))
        parts.append(table((name, *(f"x{m:g}" for m in high)), rows))
    return "\n\n".join(parts)


def _extras(extras: dict[str, Outcomes]) -> str:
    text = ""
    if long := extras.get("long"):
        rows = [
            (
                s.label,
                f"x{m:g}",
                NAMES[policy],
                str(s.steps),
                _figures(cell),
                f"{overhead(cell):.1%}",
            )
            for s, schedule in long.pairs()
            for m in _multiples(long)
            for policy in ("none", "cap", "lean")
            if (cell := long.cell(policy, s, schedule, m))
        ]
        header = ("task", "rate", "control", "steps", "loss / accuracy", "its time over training")
        text += (
            '## What it costs\n\nLean: `quantities=["loss"], max_overhead=0.05`.\n\n'
            f"{table(header, rows)}\n\n"
        )
    if edge := extras.get("edge"):
        rows = []
        for s, schedule in edge.pairs():
            for m in _multiples(edge):
                bare = edge.cell("none", s, schedule, m)
                cell = edge.cell("cap", s, schedule, m)
                if cell and bare:
                    last = min(o.data["scales"][-1] for o in cell)
                    lowest = min(min(o.data["scales"]) for o in cell)
                    losses = f"{mean_loss(bare):.4g}", f"{mean_loss(cell):.4g}"
                    rows.append((s.label, f"x{m:g}", *losses, f"{lowest:.2f}", f"{last:.2f}"))
        header = ("task", "rate", "loss without", "with", "lowest scale", "scale at the end")
        text += (
            "## Full-batch gradient descent at the edge of stability, 2000 steps\n\n"
            f"{table(header, rows)}\n\n"
        )
    if batches := extras.get("noisy"):
        text += (
            "## The batch\n\nBatches of 16 at rates that suit 64, with `BatchSizeScaler` "
            "(defaults, up to 256 items), for as many steps; and full batches, where it must not "
            f"act. Loss and accuracy, and the multiples of the batch that were used:\n\n"
            f"{_batches(batches)}\n\n"
        )
    return text


def _batches(found: Outcomes) -> str:
    rows = []
    for setting, schedule in found.pairs():
        for multiple in sorted({o.run.multiple for o in found.all if o.run.setting == setting}):
            cells = [
                found.cell(policy, setting, schedule, multiple)
                for policy in ("none", "batches", "batches-cap")
            ]
            moves = [_moves(cell) for cell in cells[1:]]
            figures = [_figures(cell) for cell in cells]
            batch = "full" if setting.batch is None else str(setting.batch)
            rate = f"{cells[1][0].run.rate:.3g}" if cells[1] else ""
            rows.append((setting.label, batch, rate, *figures, *moves))
    header = ("task", "batch", "rate", "as it is", "scaler", "scaler and cap")
    return table((*header, "used by the scaler", "and with the cap"), rows)


def _moves(cell: Sequence[object]) -> str:
    used = sorted({scale for o in cell for _, scale in o.data["moves"]} | {1.0})
    return ", ".join(f"{scale:g}" for scale in used) if cell else ""


def _cells(halves: dict[str, Outcomes]) -> str:
    parts = []
    for name, half in halves.items():
        for setting, schedule in half.pairs():
            parts.append(
                f"### {setting.label}, {schedule} ({name})\n\n{_cell(half, setting, schedule)}"
            )
    return "\n\n".join(parts)


def _cell(half: Outcomes, setting: Setting, schedule: str) -> str:
    multiples = _multiples(half)
    rows = []
    for policy in _ROWS:
        cells = [half.cell(policy, setting, schedule, m) for m in multiples]
        if any(cells):
            rows.append((NAMES[policy], *(_figures(cell) for cell in cells)))
    touches = [half.cell("cap", setting, schedule, m) for m in multiples]
    rows.append(("steps lowered", *(f"{touched(c):.0%}" if c else "" for c in touches)))
    text = table((setting.label, *(f"x{m:g}" for m in multiples)), rows)
    best = [half.cell("tuned", setting, schedule, m) for m in sorted(_tuned(half))]
    best = [cell for cell in best if cell]
    if best:
        cell = min(best, key=mean_loss)
        text += f"\n\n{NAMES['tuned']} (x{cell[0].run.multiple:g}): {_figures(cell)}"
    return text


def _figures(cell: Sequence[object]) -> str:
    if not cell:
        return ""
    loss = mean_loss(cell)
    return f"{loss:.3g} / {mean_accuracy(cell):.1%}" if math.isfinite(loss) else "NaN"


def _multiples(half: Outcomes) -> list[float]:
    return sorted({o.run.multiple for o in half.all if o.policy != "tuned"})


def _tuned(half: Outcomes) -> set[float]:
    return {o.run.multiple for o in half.all if o.policy == "tuned"}


def _sum(counts: object) -> tuple[int, int]:
    pairs = list(counts)
    return sum(k for k, _ in pairs), sum(n for _, n in pairs)


def _ratio(count: tuple[int, int]) -> str:
    return f"{count[0]} of {count[1]}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
