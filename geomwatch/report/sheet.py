"""The charts of a run as one static picture, for a paper or a pull request."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from geomwatch.errors import UsageError
from geomwatch.report.charts import Chart, charts_of
from geomwatch.report.verdict import verdict_of
from geomwatch.sinks.reading import Run

_INK = {"info": "#0072B2", "warning": "#8A5A00", "critical": "#C0143C"}
_CURVES = (("#0072B2", "-", "o"), ("#B4530A", "--", "s"), ("#4A7D2C", ":", "^"))


def write_sheet(run: Run, out: str | Path, *, title: str = "geomwatch", most: int = 6) -> None:
    """Draw the first charts of a run into a picture; bands are errors, lines are alerts.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("a picture needs matplotlib.", write="pip install matplotlib") from error
    charts = charts_of(run)[:most]
    rows = max(1, -(-len(charts) // 2))
    figure = Figure(figsize=(11, 1.2 + 2.6 * rows), layout="constrained")
    figure.suptitle("\n".join([title, *textwrap.wrap(verdict_of(run).sentence, 110)]), fontsize=10)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True).ravel()
    for ax, chart in zip(axes, charts, strict=False):
        _draw(ax, chart, run)
    for ax in axes[len(charts) :]:
        ax.set_visible(False)
    figure.savefig(out, dpi=110)


def _draw(ax: Any, chart: Chart, run: Run) -> None:
    data = chart.thinned()
    steps = data["steps"]
    for one, (color, line, marker) in zip(data["series"], _CURVES, strict=False):
        known = [(t, v) for t, v in zip(steps, one["values"], strict=True) if v is not None]
        size = 3 if len(known) < 80 else 0
        ax.plot(
            *zip(*known, strict=True),
            line,
            color=color,
            marker=marker,
            ms=size,
            lw=1.4,
            label=one["label"],
        )
        if one["errors"]:
            rows = zip(steps, one["values"], one["errors"], strict=True)
            band = [(t, v - e, v + e) for t, v, e in rows if v is not None and e is not None]
            ax.fill_between(*zip(*band, strict=True), color=color, alpha=0.2, lw=0)
    if chart.limit is not None:
        ax.axhline(chart.limit, color=_INK["critical"], ls=(0, (6, 3)), lw=1.4, label="limit")
    for alert in run.alerts[:50]:
        style = "-" if alert.severity == "critical" else ":"
        ax.axvline(alert.step, color=_INK.get(alert.severity, "#555"), lw=1, ls=style)
    if chart.is_log:
        ax.set_yscale("log")
    ax.set_title(chart.title, fontsize=9, loc="left")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7, frameon=False)
