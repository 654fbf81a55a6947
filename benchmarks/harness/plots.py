"""The plots: recall against false alarms, how early runs are announced, and what control leaves."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.cells import Cells
from harness.detectors import DETECTORS, Alarm, above, geomwatch, geomwatch_geometry
from harness.policies import BASELINES, named
from harness.scoring import curve, failed, freeze, healthy, lead_of, score
from harness.tables.ramps import WELL
from harness.tables.writing import Sets, Stories

# Okabe and Ito's colours, which stay apart for all kinds of colour vision; and line styles, for
# those who see none.
_STYLES = (
    ("#56B4E9", "-"),
    ("#0072B2", "--"),
    ("#999999", "-."),
    ("#E69F00", "-"),
    ("#CC79A7", "--"),
    ("#D55E00", ":"),
    ("#009E73", "-."),
)
_OWN = "#000000"
_FAMILIES = ((False, "SGD with momentum"), (True, "Adam, AdamW"))


def roc(sets: Sets, path: Path) -> None:
    """Draw recall on ramps against false alarms, validation set; geomwatch is a point."""
    figure, axes = _panels()
    for axis, (adaptive, title) in zip(axes, _FAMILIES, strict=True):
        held = sets.only(adaptive=adaptive, scenarios=WELL).validation
        well, ill = healthy(held), failed(held, "ramp")
        for detector, (colour, style) in zip(DETECTORS, _STYLES, strict=True):
            found = curve(detector, well, ill)
            axis.step(
                found.false, found.recall, style, color=colour, where="post", label=detector.name
            )
        _own_points(axis, well, ill)
        axis.set_title(f"{title}: {len(well)} healthy, {len(ill)} failing runs", fontsize=10)
        axis.set(xlabel="healthy runs with an alarm", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes[0].set_ylabel("failing ramps announced before the blow-up")
    _save(figure, axes[1], path)


def leads(sets: Sets, path: Path) -> None:
    """Draw the share of failing ramps announced at least so many steps early."""
    figure, axes = _panels()
    for axis, (adaptive, title) in zip(axes, _FAMILIES, strict=True):
        some = sets.only(adaptive=adaptive, scenarios=WELL)
        ill = failed(some.validation, "ramp")
        for detector, (colour, style) in zip(DETECTORS, _STYLES, strict=True):
            alarm = above(detector, freeze(detector, healthy(some.development)))
            _survival(axis, alarm, ill, style, colour, detector.name)
        _survival(axis, geomwatch, ill, "-", _OWN, "geomwatch", width=2.5)
        axis.set_title(f"{title}: {len(ill)} failing ramps", fontsize=10)
        axis.set(xlabel="steps before the blow-up", xscale="log", xlim=(1, 1500))
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("announced at least so early")
    _save(figure, axes[1], path)


def what_is_left(cells: Cells, path: Path) -> None:
    """Draw what is left to learn by the multiple: medians over tasks, schedules and seeds."""
    figure, axes = _panels()
    styles = (("#999999", "--"), (_OWN, "-"), *_STYLES)
    for axis, (adaptive, title) in zip(axes, _FAMILIES, strict=True):
        for policy, (colour, style) in zip(("none", "cap", *BASELINES), styles, strict=False):
            line = _left(cells, policy, adaptive=adaptive)
            label = named(policy).label.strip("*")
            axis.plot(*zip(*line, strict=True), style, color=colour, label=label)
        axis.set(xscale="log", xlabel="multiple of the tuned rate", ylim=(-0.02, 1.1))
        axis.set_xticks([0.25, 1, 4, 8, 16, 30], ["0.25", "1", "4", "8", "16", "30"])
        axis.minorticks_off()
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("left to learn at the end (1: chance)")
    _save(figure, axes[1], path)


def _left(cells: Cells, policy: str, *, adaptive: bool) -> list[tuple[float, float]]:
    left: dict[float, list[float]] = {}
    for s in cells.all:
        if s.policy == policy and s.run.adaptive == adaptive:
            share = s.left if math.isfinite(s.loss) else 1.0
            left.setdefault(s.run.multiple, []).append(min(share, 1.1))
    return [(m, statistics.median(shares)) for m, shares in sorted(left.items())] or [(1.0, 1.0)]


def _own_points(axis: Axes, well: Stories, ill: Stories) -> None:
    for alarm, marker, name in (
        (geomwatch, "o", "geomwatch, 95 % intervals"),
        (geomwatch_geometry, "^", "geomwatch, geometry alone"),
    ):
        found = score(alarm, well, ill)
        if not well or not ill:
            continue
        x, y = found.false.value, found.recall.value
        (left, right), (low, high) = found.false.interval, found.recall.interval
        spread = {"xerr": [[x - left], [right - x]], "yerr": [[y - low], [high - y]]}
        bars = spread if marker == "o" else {}
        axis.errorbar(x, y, **bars, fmt=marker, color=_OWN, capsize=3, label=name, zorder=5)


def _survival(
    axis: Axes, alarm: Alarm, ill: Stories, style: str, colour: str, name: str, width: float = 1.5
) -> None:
    found = np.sort([lead_of(alarm, s) for s in ill])[::-1]
    steps = np.arange(1, 1501)
    share = [(found >= k).mean() if len(found) else 0.0 for k in steps]
    axis.step(steps, share, style, where="pre", color=colour, label=name, linewidth=width)


def _panels() -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, axis: Axes, path: Path) -> None:
    """Write the legend under both panels, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
