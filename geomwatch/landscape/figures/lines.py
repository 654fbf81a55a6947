"""Figures of one dimension: slices, barriers, spectral densities.

Each `draw_` function fills a figure or a part of one, and returns the axis with the losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from geomwatch.errors import UsageError
from geomwatch.landscape.figures.style import (
    COLOURS,
    COLUMN,
    GREY,
    INK,
    MARKERS,
    new_figure,
    remark,
    styled,
)
from geomwatch.landscape.fits import polynomial_fit
from geomwatch.landscape.results import Barrier, Density, Floats, Slice

_DECADES, _MOST = 6, 9  # of a spectral density that are drawn, at least and at most
_OF_LONE = 0.3  # the height of the peak of one eigenvalue, which is to be seen
_MARKED = 0.05  # of the largest loss: a height from which on it is marked


@styled
def plot_slice(*slices: Slice, labels: Sequence[str] | None = None, degree: int = 2) -> Any:
    """Draw slices with their parabola (or polynomial of `degree`), and below what it leaves.

    Returns a matplotlib Figure of one column's width. Points that are not finite are gaps.

    Raises:
        UsageError: there is no slice, or labels are not one for each.
        ImportError: matplotlib is not installed; so with all figures.

    Example:
        >>> alphas = np.linspace(-1, 1, 9)
        >>> figure = plot_slice(Slice(alphas, 3 * alphas**2, 0.0, "mine", 0, {}))
        >>> figure.get_size_inches().tolist()  # figure.savefig("slice.pdf") keeps it
        [3.4, 3.1]
    """
    figure = new_figure(COLUMN, 3.1)
    draw_slices(figure, slices, labels, degree)
    return figure


@styled
def plot_barrier(*barriers: Barrier, labels: Sequence[str] | None = None) -> Any:
    """Draw the loss between two states, with the line between its ends and the height above it.

    Returns a matplotlib Figure of one column's width. The arrow is the height of the first.
    """
    figure = new_figure(COLUMN, 2.5)
    draw_barriers(figure, barriers, labels)
    return figure


@styled
def plot_density(*densities: Density, labels: Sequence[str] | None = None) -> Any:
    """Draw spectral densities on a logarithmic scale, with their 95 % bands.

    Returns a matplotlib Figure of one column's width. The whole curve lies within its band at a
    nominal 95 %; where the band goes down to the axis, zero is within it.
    """
    figure = new_figure(COLUMN, 2.5)
    draw_densities(figure, densities, labels)
    return figure


def draw_slices(
    figure: Any, slices: Sequence[Slice], labels: Sequence[str] | None = None, degree: int = 2
) -> Any:
    """Draw slices and fits, and their residuals below."""
    default = ["loss"] if len(slices) == 1 else [s.direction for s in slices]
    names = _names(slices, labels, default)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, 1))
    for i, (found, name) in enumerate(zip(slices, names, strict=True)):
        losses, (colour, marker) = _gaps(found.losses), _look(i)
        dots = {"marker": marker, "color": colour, "lw": 0, "ms": 2.8}
        top.plot(found.alphas, losses, label=name, **dots)
        remark(top, found.provenance, found.nonfinite)
        if np.isfinite(losses).sum() > degree + 1:
            fit = polynomial_fit(found, degree=degree)
            order = "quadratic" if degree == 2 else f"degree {degree}"
            label = f"{order} fit" if i == len(slices) - 1 else None
            top.plot(found.alphas, fit.fitted, "-", color=colour, lw=1, alpha=0.8, label=label)
            residual = _gaps(fit.residual)
            bottom.plot(found.alphas, residual, **dots)
            bottom.vlines(found.alphas, 0, residual, color=colour, lw=0.7, alpha=0.6)
    top.legend(loc="best")
    top.set_ylabel("loss")
    bottom.axhline(0, color=GREY, lw=0.7)
    bottom.set_ylabel("residual")
    bottom.set_xlabel(f"α, {slices[0].direction}" if len(slices) == 1 else "α")
    return top


def draw_barriers(
    figure: Any, barriers: Sequence[Barrier], labels: Sequence[str] | None = None
) -> Any:
    """Draw the losses on paths between two states."""
    names = _names(barriers, labels, [_described(b) for b in barriers])
    ax = figure.subplots()
    for i, (found, name) in enumerate(zip(barriers, names, strict=True)):
        colour, marker = _look(i)
        ax.plot(found.alphas, _gaps(found.losses), marker=marker, color=colour, label=name, ms=2.5)
        ax.plot((0, 1), (found.loss_a, found.loss_b), ls=":", color=colour, lw=1)
        remark(ax, found.provenance, found.nonfinite)
    _mark_height(ax, barriers[0])  # once all are drawn: it makes room above
    ax.set_xlabel("α, from state A to state B")
    ax.set_ylabel("loss")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    if len(names) > 1:
        above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.02), "borderaxespad": 0.2}
        tight = {"columnspacing": 0.8, "handletextpad": 0.4, "handlelength": 1.3, "fontsize": 6.3}
        ax.legend(ncols=len(names), **tight, **above)
    return ax


def draw_densities(
    figure: Any, densities: Sequence[Density], labels: Sequence[str] | None = None
) -> Any:
    """Draw spectral densities with their bands."""
    names = _names(densities, labels, [f"σ = {d.sigma:.2g}, 95 % band" for d in densities])
    ax = figure.subplots()
    largest = max(float(found.density.max()) for found in densities)
    lone = min(1 / (found.dim * found.sigma * math.sqrt(2 * math.pi)) for found in densities)
    floor = max(min(largest * 10.0**-_DECADES, _OF_LONE * lone), largest * 10.0**-_MOST)
    for i, (found, name) in enumerate(zip(densities, names, strict=True)):
        colour, _ = _look(i)
        low, high = found.density - found.error, found.density + found.error
        band = {"color": colour, "alpha": 0.25, "lw": 0}
        ax.fill_between(found.grid, np.maximum(low, floor), np.maximum(high, floor), **band)
        shown = np.where(found.density >= floor, found.density, np.nan)
        ax.plot(found.grid, shown, color=colour, lw=1.1, label=name)
        remark(ax, found.provenance)
    ax.axvline(0, color=GREY, lw=0.7, zorder=0)
    ax.set_yscale("log")
    ax.set_ylim(floor, 3 * largest)
    ax.set_xlabel("eigenvalue of the Hessian")
    ax.set_ylabel("density")
    ax.legend(loc="upper right", borderaxespad=0, handlelength=1.0, handletextpad=0.4)
    return ax


def _mark_height(ax: Any, found: Barrier) -> None:
    """Mark the height above the line between the ends with an arrow and its value."""
    losses, height, x = _gaps(found.losses), found.height, found.argmax_height
    if height is None or x is None or height <= _MARKED * np.nanmax(losses):
        return
    top = float(losses[round(x * (len(losses) - 1))])
    arrow = {"arrowstyle": "<->", "color": INK, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x, top), (x, top - height), arrowprops=arrow)
    label = f"height {height:.3g}"
    ax.annotate(label, (x, top), (0, 4), textcoords="offset points", fontsize=7, ha="center")
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, low + 1.12 * (top - low)))


def _described(found: Barrier) -> str:
    """Say in a word or two which path it is."""
    if found.path == "linear":
        return "aligned" if found.aligned else "straight"
    return "Bezier, aligned" if found.aligned else "Bezier"


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def _gaps(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def _names(
    results: Sequence[object], labels: Sequence[str] | None, default: Sequence[str]
) -> Sequence[str]:
    if not results:
        raise UsageError("a figure needs at least one result, got none.")
    if labels is not None and len(labels) != len(results):
        raise UsageError(f"labels must be one for each result, got {len(labels)}, {len(results)}.")
    return default if labels is None else labels
