"""Figures of one dimension: slices, barriers, spectral densities."""

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


@styled
def plot_slice(*slices: Slice, labels: Sequence[str] | None = None, degree: int = 2) -> Any:
    """Draw slices with their parabola (or polynomial of `degree`), and below what it leaves.

    Returns a matplotlib Figure of one column's width. Points that are not finite are gaps.
    """
    names = _names(slices, labels, slice_names(slices))
    figure = new_figure(COLUMN, 3.1)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    draw_slices(top, bottom, slices, names, degree)
    bottom.set_xlabel(f"α, {slices[0].direction}" if len(slices) == 1 else "α")
    return figure


@styled
def plot_barrier(*barriers: Barrier, labels: Sequence[str] | None = None) -> Any:
    """Draw the loss between two states, with the line between its ends and the height above it.

    Returns a matplotlib Figure of one column's width.
    """
    names = _names(barriers, labels, [described(b) for b in barriers])
    figure = new_figure(COLUMN, 2.5)
    ax = figure.subplots()
    draw_barriers(ax, barriers, names)
    ax.set_xlabel("α, from state A to state B")
    return figure


@styled
def plot_density(*densities: Density, labels: Sequence[str] | None = None) -> Any:
    """Draw spectral densities on a logarithmic scale, with their 95 % bands.

    Returns a matplotlib Figure of one column's width.
    """
    names = _names(densities, labels, density_names(densities))
    figure = new_figure(COLUMN, 2.5)
    ax = figure.subplots()
    draw_densities(ax, densities, names)
    ax.set_xlabel("eigenvalue of the Hessian")
    return figure


def draw_slices(
    top: Any, bottom: Any, slices: Sequence[Slice], names: Sequence[str], degree: int = 2
) -> None:
    """Draw slices and fits into `top`, residuals into `bottom`."""
    for i, (found, name) in enumerate(zip(slices, names, strict=True)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        losses = _gaps(found.losses)
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


def draw_barriers(ax: Any, barriers: Sequence[Barrier], names: Sequence[str]) -> None:
    """Draw the losses on paths between two states into an axis."""
    for i, (found, name) in enumerate(zip(barriers, names, strict=True)):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        losses = _gaps(found.losses)
        line = (found.loss_a, found.loss_b)
        ax.plot(found.alphas, losses, marker=marker, color=colour, label=name, ms=2.5)
        ax.plot((0, 1), line, ls=":", color=colour, lw=1)
        remark(ax, found.provenance, found.nonfinite)
    first = barriers[0]
    if first.height is not None and first.height > 0.05 * np.nanmax(_gaps(first.losses)):
        _mark_height(ax, first, _gaps(first.losses))  # once all are drawn: it makes room above
    ax.set_ylabel("loss")
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    if len(names) > 1:
        above = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
        tight = {"columnspacing": 0.8, "handletextpad": 0.4, "handlelength": 1.3, "fontsize": 6.3}
        ax.legend(ncols=len(names), **tight, **above)


def draw_densities(ax: Any, densities: Sequence[Density], names: Sequence[str]) -> None:
    """Draw spectral densities with their bands into an axis."""
    largest = max(float(found.density.max()) for found in densities)
    lone = min(1 / (found.dim * found.sigma * math.sqrt(2 * math.pi)) for found in densities)
    floor = max(min(largest * 10.0**-_DECADES, _OF_LONE * lone), largest * 10.0**-_MOST)
    for i, (found, name) in enumerate(zip(densities, names, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        low, high = found.density - found.error, found.density + found.error
        band = {"color": colour, "alpha": 0.25, "lw": 0}
        ax.fill_between(found.grid, np.maximum(low, floor), np.maximum(high, floor), **band)
        shown = np.where(found.density >= floor, found.density, np.nan)
        ax.plot(found.grid, shown, color=colour, lw=1.1, label=name)
        remark(ax, found.provenance)
    ax.axvline(0, color=GREY, lw=0.7, zorder=0)
    ax.set_yscale("log")
    ax.set_ylim(floor, 3 * largest)
    ax.set_ylabel("density")
    ax.legend(loc="upper right", borderaxespad=0)


def _mark_height(ax: Any, found: Barrier, losses: Floats) -> None:
    """Mark the height above the line between the ends with an arrow and its value."""
    assert found.argmax_height is not None
    x, top = found.argmax_height, float(losses[round(found.argmax_height * (len(losses) - 1))])
    arrow = {"arrowstyle": "<->", "color": INK, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", (x, top), (x, top - float(found.height or 0)), arrowprops=arrow)
    label = f"height {found.height:.3g}"
    ax.annotate(label, (x, top), (0, 4), textcoords="offset points", fontsize=7, ha="center")
    low, high = ax.get_ylim()
    ax.set_ylim(low, max(high, low + 1.12 * (top - low)))


def slice_names(slices: Sequence[Slice]) -> list[str]:
    """The directions, or plainly the loss if there is one."""
    return ["loss"] if len(slices) == 1 else [s.direction for s in slices]


def density_names(densities: Sequence[Density]) -> list[str]:
    """The width of the smoothing of each."""
    return [f"σ = {found.sigma:.2g}, 95 % band" for found in densities]


def described(found: Barrier) -> str:
    """Say in a word or two which path it is."""
    words = {"linear": "straight", "bezier": "Bezier"}[found.path]
    if not found.aligned:
        return words
    return "aligned" if found.path == "linear" else f"{words}, aligned"


def _gaps(values: Floats) -> Floats:
    return np.where(np.isfinite(values), values, np.nan)


def _names(
    results: Sequence[object], labels: Sequence[str] | None, default: Sequence[str]
) -> Sequence[str]:
    if not results:
        raise UsageError("a figure needs at least one result, got none.")
    if labels is None:
        return default
    if len(labels) != len(results):
        raise UsageError(f"labels must be one for each result, got {len(labels)}, {len(results)}.")
    return labels
