"""Several runs side by side: a table of what became of each, and their curves in one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geomwatch.report.charts import overlaid
from geomwatch.report.page import page
from geomwatch.report.verdict import Verdict, last_step, verdict_of
from geomwatch.sinks.reading import Run

Table = list[list[str]]


def compare(runs: Mapping[str, Run]) -> Table:
    """Return a row for each run, the head first: its alerts, margin, loss, and what differs."""
    differing = _differing([run.run for run in runs.values()])
    head = ["run", "steps", "first alert", "alerts", "peak margin", "last loss", *differing]
    return [head, *(_row(name, run, differing) for name, run in runs.items())]


def as_text(table: Table) -> str:
    """Return a table in columns."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def write_comparison(runs: Mapping[str, Run], out: str | Path) -> Table:
    """Write the page of several runs; return their table."""
    table = compare(runs)
    verdicts = {name: verdict_of(run) for name, run in runs.items()}
    calm = [name for name, v in verdicts.items() if v.severity in ("", "info")]
    sentence = f"{len(runs)} runs, {len(calm)} of them without a warning: {', '.join(calm) or '-'}."
    verdict = Verdict("" if len(calm) == len(runs) else "warning", sentence, ())
    title = " and ".join(runs)
    text = page(Run(), verdict, title=title, charts=overlaid(runs), table=table)
    Path(out).write_text(text, encoding="utf-8")
    return table


def _row(name: str, run: Run, differing: Sequence[str]) -> list[str]:
    loud = [a for a in run.alerts if a.severity != "info"]
    margins = [
        e.value
        for r in run.records
        if (e := r.estimates.get("stability_margin")) is not None and e.value is not None
    ]
    losses = [r.loss for r in run.records if math.isfinite(r.loss)]
    losses += [k.loss for k in run.looks[-1:] if k.loss is not None]
    return [
        name,
        str(last_step(run)),
        f"{loud[0].rule} at {loud[0].step}" if loud else "-",
        str(len(loud)),
        f"{max(margins):.3g}" if margins else "-",
        f"{losses[-1]:.4g}" if losses else "-",
        *(_shown(run.run.get(key)) for key in differing),
    ]


def _differing(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the runs say of themselves that is not the same in all."""
    keys = dict.fromkeys(key for run in runs for key in run)
    return [key for key in keys if len({repr(run.get(key)) for run in runs}) > 1]


def _shown(value: object) -> str:
    several = value if isinstance(value, list) else [value]
    return "-" if value is None else ", ".join(map(str, several))
