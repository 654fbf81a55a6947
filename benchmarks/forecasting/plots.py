"""The two plots: recall against false alarms, and how many runs are announced how early."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from forecasting.detectors import DETECTORS, Alarm, above, geomwatch, geomwatch_geometry
from forecasting.halves import Halves, Stories
from forecasting.ramps import WELL
from forecasting.scoring import curve, failed, freeze, healthy, lead_of, score

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


def roc(halves: Halves, path: Path) -> None:
    """Draw recall on ramps against false alarms, held-back half; geomwatch is a point."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    for axis, (adaptive, title) in zip(axes, _FAMILIES, strict=True):
        held = halves.only(adaptive=adaptive, scenarios=WELL).held
        well, ill = healthy(held), failed(held, "ramp")
        for detector, (colour, style) in zip(DETECTORS, _STYLES, strict=True):
            found = curve(detector, well, ill)
            axis.step(
                found.false, found.recall, style, color=colour, where="post", label=detector.name
            )
        _own_points(axis, well, ill)
        _frame(axis, f"{title}: {len(well)} healthy, {len(ill)} failing runs")
        axis.set(xlabel="healthy runs with an alarm", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes[0].set_ylabel("failing ramps announced before the blow-up")
    _legend(figure, axes[1])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def leads(halves: Halves, path: Path) -> None:
    """Draw the share of failing ramps announced at least so many steps early."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), sharey=True, layout="constrained")
    for axis, (adaptive, title) in zip(axes, _FAMILIES, strict=True):
        some = halves.only(adaptive=adaptive, scenarios=WELL)
        ill = failed(some.held, "ramp")
        for detector, (colour, style) in zip(DETECTORS, _STYLES, strict=True):
            alarm = above(detector, freeze(detector, healthy(some.tune)))
            _survival(axis, alarm, ill, style, colour, detector.name)
        _survival(axis, geomwatch, ill, "-", _OWN, "geomwatch", width=2.5)
        _frame(axis, f"{title}: {len(ill)} failing ramps")
        axis.set(xlabel="steps before the blow-up", xscale="log", xlim=(1, 1500))
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("announced at least so early")
    _legend(figure, axes[1])
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
    axis.plot(steps, share, style, color=colour, label=name, linewidth=width)


def _legend(figure: Figure, axis: Axes) -> None:
    """Write the legend under both panels, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def _frame(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)
