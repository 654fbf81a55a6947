"""The charts of a run: numbers by step, with errors and limits, thinned so that extremes stay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomwatch.records import Estimate, Record
from geomwatch.report.verdict import rates_of
from geomwatch.sinks.reading import Run

MOST = 1500  # points of a chart, about one for each pixel of a wide screen
_DIGITS = 5  # of a number in the page

Points = Mapping[int, float]  # step -> value


@dataclass(frozen=True, slots=True)
class Series:
    """One curve: values by step, and their errors where they are known."""

    label: str
    values: Points
    errors: Points | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves that share an axis; `limit` is a level to be held against, `note` what to see."""

    name: str
    title: str
    note: str
    series: tuple[Series, ...]
    limit: float | None = None
    is_log: bool = False

    def thinned(self, most: int = MOST) -> dict[str, Any]:
        """Return the chart as plain data: in each stretch of steps the extremes of each curve."""
        steps = np.array(sorted(set().union(*(s.values for s in self.series))), dtype=np.int64)
        columns = [np.array([s.values.get(int(t), math.nan) for t in steps]) for s in self.series]
        kept = _extremes(columns, len(steps), most)
        steps = steps[kept]
        return {
            "name": self.name,
            "title": self.title,
            "note": self.note,
            "limit": self.limit,
            "log": self.is_log,
            "steps": steps.tolist(),
            "series": [
                {
                    "label": s.label,
                    "values": _plain(column[kept]),
                    "errors": None if s.errors is None else _plain(_at(s.errors, steps)),
                }
                for s, column in zip(self.series, columns, strict=True)
            ],
        }


def charts_of(run: Run) -> list[Chart]:
    """Return the charts that a run has anything for."""
    made = [chart(run) for chart in _FIXED]
    singles = (_single(run, name, title, note) for name, title, note in _SINGLE)
    made += [chart for chart in singles if len(chart.series[0].values) > 1]
    kept = (_without_empty(chart) for chart in made)
    return [chart for chart in kept if chart.series]


def measured_once(run: Run) -> dict[str, str]:
    """Return what was measured at one probe alone, which makes no curve: name -> value and step."""
    found = {name: _estimates(run, name, name) for name, _, _ in _SINGLE}
    alone = {name: series for name, series in found.items() if len(series.values) == 1}
    return {
        name: f"{value:.3g} at step {step}"
        for name, series in alone.items()
        for step, value in series.values.items()
    }


def overlaid(runs: Mapping[str, Run]) -> list[Chart]:
    """Return the charts of several runs in one another: of each its first curve by name of run."""
    by_name: dict[str, list[tuple[str, Chart]]] = {}
    for label, run in runs.items():
        for chart in charts_of(run):
            by_name.setdefault(chart.name, []).append((label, chart))
    return [_joined(found) for found in by_name.values()]


def _joined(found: Sequence[tuple[str, Chart]]) -> Chart:
    first = found[0][1]
    series = tuple(
        Series(f"{label}: {one.label}", one.values)
        for label, chart in found
        for one in chart.series[:1]
    )
    return Chart(first.name, first.title, first.note, series, first.limit, first.is_log)


def _margins(run: Run) -> Chart:
    looks = [look for look in run.looks if look.limit and look.gradient_margin.value is not None]
    along = {k.step: (k.gradient_margin.value or 0.0) / (k.limit or 1.0) for k in looks}
    errors = {k.step: (k.gradient_margin.error or 0.0) / (k.limit or 1.0) for k in looks}
    return Chart(
        "margins",
        "Margins",
        "1 is the limit. Sentinels see the curvature along the steps (gradient margin, over the "
        "level that the rule warns above), probes that of the sharpest direction.",
        (
            Series("gradient margin / its limit", along, errors),
            _estimates(run, "stability_margin", "stability margin"),
            _estimates(run, "stochastic_margin", "stochastic margin"),
        ),
        limit=1.0,
        is_log=True,
    )


def _loss(run: Run) -> Chart:
    loss = {r.step: r.loss for r in run.records}
    loss |= {k.step - 1: k.loss for k in run.looks if k.loss is not None}
    return Chart("loss", "Loss", "Of the steps that were looked at.", (Series("loss", loss),))


def _curvature(run: Run) -> Chart:
    limits = {}
    for record in run.records:
        top, margin = _value(record, "lambda_max"), _value(record, "stability_margin")
        if top is not None and margin is not None and top > 0 and margin > 0:
            limits[record.step] = top / margin
    return Chart(
        "curvature",
        "Largest curvature",
        "λ_max, the largest eigenvalue of the Hessian, and what the optimizer allows at its rate.",
        (_estimates(run, "lambda_max", "λ_max"), Series("limit at this rate", limits)),
        is_log=True,
    )


def _rate(run: Run) -> Chart:
    given = {r.step: max(r.lr) for r in run.records if r.lr}
    applied = dict(rates_of(run))
    return Chart(
        "rate",
        "Learning rate",
        "As given, and as the steps were taken under a controller.",
        (Series("applied", applied), Series("given", given)),
        is_log=True,
    )


def _cost(run: Run) -> Chart:
    share = {k.step: 100 * k.overhead for k in run.looks if k.overhead is not None}
    return Chart(
        "cost",
        "Cost, % of the time of training",
        "All that geomwatch has taken so far. The first probe weighs most in a short run.",
        (Series("cost so far", share),),
        is_log=True,
    )


_FIXED: tuple[Callable[[Run], Chart], ...] = (_margins, _loss, _curvature, _rate, _cost)
_SINGLE = (
    (
        "batch_sharpness",
        "Sharpness along the gradient",
        "Curvature that the gradient itself meets.",
    ),
    ("trace", "Trace of the Hessian", "The sum of all eigenvalues."),
    ("gradient_noise_scale", "Gradient noise scale", "Batches below it are mostly noise."),
    ("effective_rank", "Effective rank", "How many directions carry the curvature."),
    ("roughness", "Roughness", "How much the loss wiggles at the scale of a step."),
    ("normalized_sharpness", "Normalised sharpness", "Sharpness that no rescaling changes."),
)


def _single(run: Run, name: str, title: str, note: str) -> Chart:
    return Chart(name, title, note, (_estimates(run, name, name),))


def _without_empty(chart: Chart) -> Chart:
    known = tuple(s for s in map(_finite, chart.series) if s.values)
    return Chart(chart.name, chart.title, chart.note, known, chart.limit, chart.is_log)


def _finite(series: Series) -> Series:
    values = {t: v for t, v in series.values.items() if math.isfinite(v)}
    return Series(series.label, values, series.errors)


def _estimates(run: Run, name: str, label: str) -> Series:
    found: list[tuple[int, Estimate]] = [
        (r.step, e)
        for r in run.records
        if (e := r.estimates.get(name)) is not None and e.value is not None and e.status != "held"
    ]
    values = {step: e.value for step, e in found if e.value is not None}
    errors = {step: e.error for step, e in found if e.error is not None}
    return Series(label, values, errors or None)


def _value(record: Record, name: str) -> float | None:
    found = record.estimates.get(name)
    return None if found is None or found.status == "held" else found.value


def _extremes(columns: list[Any], count: int, most: int) -> Any:
    """Return the indices to keep: of each stretch its first, and where each curve is extreme."""
    if count <= most:
        return np.arange(count)
    stretches = max(1, most // (2 * len(columns) + 1))
    edges = np.linspace(0, count, stretches + 1).astype(int)
    kept = {0, count - 1}
    for low, high in itertools.pairwise(edges):
        kept.add(int(low))
        for column in columns:
            part = column[low:high]
            if np.isfinite(part).any():
                kept |= {int(low + np.nanargmin(part)), int(low + np.nanargmax(part))}
    return np.array(sorted(kept))


def _at(errors: Points, steps: Any) -> Any:
    return np.array([errors.get(int(t), math.nan) for t in steps])


def _plain(values: Iterable[float]) -> list[float | None]:
    return [float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None for v in values]
