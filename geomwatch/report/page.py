"""The page of a run: everything in one file, escaped, without a request to anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomwatch.errors import UsageError
from geomwatch.records import VERSION
from geomwatch.report.charts import Chart, charts_of, measured_once
from geomwatch.report.verdict import Verdict, last_step, verdict_of
from geomwatch.sinks.reading import Run

_HERE = Path(__file__).parent
_MOST = 200  # rows of a table, alerts on the strip
_MARKS = {"info": "i", "warning": "!", "critical": "!!"}


def write_page(run: Run, out: str | Path, *, title: str = "geomwatch") -> Verdict:
    """Write the page of a run; return what became of it.

    Raises:
        UsageError: jinja2 is not installed.
    """
    verdict = verdict_of(run)
    Path(out).write_text(page(run, verdict, title=title), encoding="utf-8")
    return verdict


def page(
    run: Run,
    verdict: Verdict,
    *,
    title: str = "geomwatch",
    charts: Sequence[Chart] | None = None,
    table: Sequence[Sequence[str]] = (),
) -> str:
    """Return the page of a run as HTML; all that a file says is escaped.

    Args:
        run: what alerts, adjustments and provenance are of.
        verdict: what became of it.
        title: the heading.
        charts: others than its own.
        table: rows to show first, the first of them the head.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise UsageError("a report needs jinja2.", write="pip install jinja2") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = [chart.thinned() for chart in (charts_of(run) if charts is None else charts)]
    return environment.get_template("page.html").render(
        title=title,
        verdict=verdict,
        table=table,
        charts=shown,
        data={"charts": shown, "marks": _marks(run, verdict)},
        strip=_strip(run, verdict),
        followed=verdict.followed[-_MOST:],
        adjustments=run.adjustments[-_MOST:],
        provenance=_provenance(run),
        lost=run.lost[:_MOST],
        hidden=max(len(run.lost) - _MOST, 0),
        marks=_MARKS,
        version=VERSION,
        uplot=_text("vendor/uPlot.iife.min.js"),
        uplot_css=_text("vendor/uPlot.min.css"),
        css=_text("page.css"),
        script=_text("page.js"),
    )


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _marks(run: Run, verdict: Verdict) -> list[dict[str, Any]]:
    """Return what stands in all charts at its step: alerts, and what controllers have turned."""
    found = [
        {"step": f.alert.step, "kind": f.alert.severity, "text": f.alert.rule}
        for f in verdict.followed[-_MOST:]
    ]
    turned = [a for a in run.adjustments if a.effect == "applied"][-_MOST:]
    return found + [{"step": a.step, "kind": "adjusted", "text": a.knob} for a in turned]


def _strip(run: Run, verdict: Verdict) -> list[dict[str, Any]]:
    """Return where alerts stand along the run, in percent."""
    whole = max(last_step(run), 1)
    alerts = [f.alert for f in verdict.followed[-_MOST:]]
    return [
        {
            "left": round(100 * alert.step / whole, 2),
            "kind": alert.severity,
            "text": f"step {alert.step}: {alert.severity}, {alert.rule}",
            "mark": _MARKS.get(alert.severity, "?"),
        }
        for alert in alerts
    ]


def _provenance(run: Run) -> dict[str, str]:
    """Return what ran, in words: what the run says of itself, then how the last probe measured."""
    found = {k: v for k, v in run.run.items() if k != "schema"}
    if run.records:
        found |= {f"last probe: {k}": v for k, v in run.records[-1].provenance.items()}
    found |= {f"measured once: {k}": v for k, v in measured_once(run).items()}
    return {k: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in found.items()}
