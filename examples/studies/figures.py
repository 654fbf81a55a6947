"""The figures of the report, in the look of geomwatch.landscape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomwatch import landscape
from geomwatch.landscape.figures.style import COLOURS, GREY, INK, MARKERS, PAGE, new_figure, styled
from studies.cases import ARCHITECTURES, Case
from studies.inference import Interval, ratio
from studies.picturing import KINDS, picture
from studies.ranking import NAMES, SIGNATURES, TARGETS, Found
from studies.settings import STAGES, Settings
from studies.store import Store
from studies.table import Table

_OVER_TIME = {
    "lambda_max": "λ_max",
    "trace": "tr(H)",
    "trace_per_param": "tr(H)/D",
    "train_filter_variance": "R, filter-normalised v",
    "ggn_effective_rank": "r_eff, Gauss-Newton",
    "normalized_sharpness": "NS, ε = 0.01",
    "barrier_height": "barrier height",
    "difficulty": "difficulty O",
}
_PARTS = {
    "lambda_max": "λ_max",
    "trace": "tr(H)",
    "train_filter_worst": "worst R",
    "normalized_sharpness": "NS",
    "barrier_height": "barrier",
    "steps_to_target": "steps",
}

_WIDEST = 70.0  # ratio that is drawn


def landscapes(store: Store, table: Table, settings: Settings) -> Any:
    """The paper's figures 1 to 3 in one: slice, plane, barrier and spectrum of each net."""
    nets = {
        label(case): [picture(store, case, kind, settings) for kind in KINDS]
        for case in table.plain
    }
    return landscape.plot_comparison(nets)


def label(case: Case) -> str:
    """Return what figures and tables call a net."""
    return f"{case.architecture}, text" if case.kind == "text" else case.architecture


@styled
def over_time(table: Table) -> Any:
    """Each quantity at the three stages, mean and standard error of the seeds."""
    figure = new_figure(PAGE, 3.6)
    axes = figure.subplots(2, 4, sharex=True).ravel()
    for ax, (quantity, title) in zip(axes, _OVER_TIME.items(), strict=True):
        values = [
            v for case in table.plain for s in STAGES for v in table.mean(case, quantity, s).values
        ]
        for i, case in enumerate(table.plain):
            means = [table.mean(case, quantity, stage) for stage in STAGES]
            y = [np.nan if m.mean is None else m.mean for m in means]
            bars = [m.error or 0.0 for m in means]
            x = np.arange(len(STAGES)) + 0.06 * (i - 1.5)
            marks = {"color": COLOURS[i], "marker": MARKERS[i], "ms": 3.5, "capsize": 2, "lw": 1}
            ax.errorbar(x, y, bars, label=label(case), elinewidth=0.8, **marks)
        positive = [v for v in values if v > 0]
        if (
            positive
            and len(positive) == len([v for v in values if v])
            and max(positive) > 20 * min(positive)
        ):
            ax.set_yscale(
                "symlog" if len(positive) < len(values) else "log",
                **_linear_below(positive, values),
            )
        ax.set_title(title)
        ax.set_xticks(range(len(STAGES)), ("start", "10 %", "end"))
        ax.set_xlim(-0.35, len(STAGES) - 0.65)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure


def _linear_below(positive: Sequence[float], values: Sequence[float]) -> dict[str, float]:
    low = max(min(positive), 1e-4 * max(positive))
    return {"linthresh": low} if len(positive) < len(values) else {}


@styled
def parts(table: Table) -> Any:
    """What skip connections, normalisation and four times the width do to each net, at the end."""
    rows = comparisons(table)
    figure = new_figure(PAGE, 0.6 + 0.2 * len(rows))
    axes = figure.subplots(1, len(_PARTS), sharey=True)
    for ax, (quantity, title) in zip(axes, _PARTS.items(), strict=True):
        for y, (_, architecture, a, b) in enumerate(rows):
            found = ratio(table.mean(a, quantity), table.mean(b, quantity))
            if found is not None:
                _whisker(ax, found, y, ARCHITECTURES.index(architecture))
        ax.axvline(1, color=GREY, lw=0.7, zorder=0)
        ax.set_xscale("log")
        ax.set_xlim(1 / _WIDEST, _WIDEST)
        ax.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        ax.set_title(title)
    axes[0].set_yticks(range(len(rows)), [f"{name}, {part}" for part, name, _, _ in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel("ratio, with to without; x4 to x1", fontsize=8)
    return figure


def comparisons(table: Table) -> list[tuple[str, str, Case, Case]]:
    """Return (part, architecture, the net with it, the net without it)."""
    rows = []
    for part in ("skip", "norm"):
        for name in ARCHITECTURES:
            base = table.net(name)
            other = table.variant(name, f"with {part}", f"without {part}")
            if other is not None:
                rows.append(
                    (part, name, *((base, other) if getattr(base, part) else (other, base)))
                )
    for name in ARCHITECTURES:
        narrow = table.variant(name, "width/4")
        if narrow is not None:
            rows.append(("width x4", name, table.net(name), narrow))
    return rows


@styled
def ranks(found: dict[tuple[str, str], Found]) -> Any:
    """Rank correlations of early quantities, alone and together, with each target."""
    names = [*NAMES.values(), *SIGNATURES]
    keys = [*NAMES, *SIGNATURES]
    figure = new_figure(PAGE, 0.8 + 0.2 * len(keys))
    axes = figure.subplots(1, len(TARGETS), sharey=True)
    for ax, (target, title) in zip(axes, TARGETS.items(), strict=True):
        for y, key in enumerate(keys):
            one = found.get((key, target))
            for interval, shift, i in (
                ((one.pooled, -0.14, 0), (one.within, 0.14, 1)) if one else ()
            ):
                if interval is not None:
                    _whisker(ax, interval, y + shift, i)
        ax.axvline(0, color=GREY, lw=0.7, zorder=0)
        ax.axhline(len(NAMES) - 0.5, color=GREY, lw=0.5, ls=":")
        ax.set_xlim(-1.03, 1.03)
        ax.set_title(title)
        ax.set_xlabel("Spearman's ρ")
    axes[0].set_yticks(range(len(keys)), names)
    axes[0].set_ylim(len(keys) - 0.5, -0.5)
    handles = [
        axes[0].plot([], [], color=COLOURS[i], marker=MARKERS[i], ms=3.5, label=text)[0]
        for i, text in enumerate(("all runs", "within an architecture"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _whisker(ax: Any, found: Interval, y: float, i: int) -> None:
    ax.plot((found.low, found.high), (y, y), color=COLOURS[i], lw=1)
    ax.plot(found.value, y, color=COLOURS[i], marker=MARKERS[i], ms=3.5)


def write(figures: dict[str, Any], out: Path) -> None:
    """Write each figure as a PNG that is readable on a page."""
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=200)


@styled
def artefacts(table: Table) -> Any:
    """Power iteration without deflation, and slices of a loss that changes."""
    figure = new_figure(PAGE, 4.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1))
    axes = above.subplots(1, len(table.plain))
    for ax, case in zip(np.atleast_1d(axes), table.plain, strict=True):
        _eigenvalues(ax, table.artefact(case, "power"))
        ax.set_title(label(case))
    np.atleast_1d(axes)[0].set_ylabel("eigenvalue")
    handles, names = np.atleast_1d(axes)[0].get_legend_handles_labels()
    above.legend(handles, names, loc="outside lower center", ncols=len(names))
    axes = below.subplots(1, len(table.plain))
    for ax, case in zip(np.atleast_1d(axes), table.plain, strict=True):
        rugged = "redrawn" if case.architecture == "Transformer" else "batches"
        _two_slices(ax, table.artefact(case, "rugged"), rugged)
        ax.set_xlabel("α, unit random")
    np.atleast_1d(axes)[0].set_ylabel("loss")
    return figure


def _eigenvalues(ax: Any, found: dict[str, Any]) -> None:
    ways = (
        ("without_deflation", "power, no deflation"),
        ("with_deflation", "power, deflated"),
        ("lanczos", "Lanczos"),
    )
    for i, (key, name) in enumerate(ways):
        x = np.arange(1, len(found[key]) + 1)
        look = {"mfc": "none", "ms": 6} if key == "lanczos" else {"ms": 3.5}
        colour = INK if key == "lanczos" else COLOURS[1 - i]
        ax.plot(x, found[key], color=colour, marker=MARKERS[i], lw=0.8, label=name, **look)
    ax.set_ylim(bottom=0)
    ax.set_xticks(x)


def _two_slices(ax: Any, found: dict[str, Any], rugged: str) -> None:
    name = {"redrawn": "dropout drawn anew", "batches": "another batch each"}[rugged]
    for i, (way, text) in enumerate(((f"{rugged}_unit", name), ("off_unit", "as it is"))):
        one = found[way]
        ax.plot(
            one["alphas"],
            one["losses"],
            color=COLOURS[1 - i],
            lw=1,
            marker=MARKERS[1 - i],
            ms=1.8,
            label=text,
        )
    ax.legend(loc="upper center")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.25 * (high - low))
