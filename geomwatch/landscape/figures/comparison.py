"""Several nets side by side: a column for each, a row for each kind of landscape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from geomwatch.errors import UsageError
from geomwatch.landscape.figures.lines import (
    density_names,
    described,
    draw_barriers,
    draw_densities,
    draw_slices,
    slice_names,
)
from geomwatch.landscape.figures.style import PAGE, new_figure, styled
from geomwatch.landscape.figures.surfaces import add_bar, draw_contours, draw_surface
from geomwatch.landscape.results import Barrier, Density, Plane, Slice

_HEIGHTS = {Slice: 2.3, Plane: 2.1, Barrier: 1.8, Density: 1.8}  # inches
_SURFACE = 2.1


@styled
def plot_comparison(
    nets: Mapping[str, Sequence[object]], *, surfaces: bool = True, share: bool = False
) -> Any:
    """Draw slices, planes, barriers and densities of several nets, a column for each.

    As the paper's figures 1 to 3 in one: the slice with its fit and residual, the plane as contours
    and as a surface, the barrier, the density; what no net has is left out, what one lacks is
    blank. Several results of a kind are drawn into one axis (planes: the first). `share` gives each
    row of curves one scale; without it compare shapes, not heights.

    Returns a matplotlib Figure of a page's width.

    Raises:
        UsageError: there is no net, or something that is no result.
    """
    rows = _rows(nets, surfaces)
    heights = [height for _, height, _ in rows]
    figure = new_figure(max(PAGE, 2.3 * len(nets)), sum(heights) + 0.3)
    bands = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (kind, _, draw), band in zip(rows, bands, strict=True):
        cells = band.subfigures(1, len(nets), squeeze=False)[0]
        axes = []
        for cell, found in zip(cells, nets.values(), strict=True):
            chosen = [result for result in found if isinstance(result, kind)]
            axes.append(draw(cell, chosen) if chosen else None)
        if share:
            _share([ax for ax in axes if ax is not None])
        if band is bands[0]:
            for cell, name in zip(cells, nets, strict=True):
                cell.suptitle(name, fontsize=9.5, fontweight="bold")
    return figure


def _rows(
    nets: Mapping[str, Sequence[object]], surfaces: bool
) -> list[tuple[Any, float, Callable[[Any, list[Any]], Any]]]:
    results = [result for found in nets.values() for result in found]
    unknown = [type(r).__name__ for r in results if not isinstance(r, tuple(_HEIGHTS))]
    if not results or unknown:
        raise UsageError(
            "nets must be {name: [Slice, Plane, Barrier, Density, ...]}, got "
            f"{', '.join(unknown) or 'no result'}."
        )
    draw: dict[Any, Callable[[Any, list[Any]], Any]] = {
        Slice: _slices,
        Plane: _contours,
        Barrier: _barriers,
        Density: _densities,
    }
    rows: list[tuple[Any, float, Callable[[Any, list[Any]], Any]]] = []
    for kind, height in _HEIGHTS.items():
        if any(isinstance(r, kind) for r in results):
            rows.append((kind, height, draw[kind]))
            if kind is Plane and surfaces:
                rows.append((Plane, _SURFACE, _surface))
    return rows


def _slices(cell: Any, found: list[Slice]) -> Any:
    top, bottom = cell.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    draw_slices(top, bottom, found, slice_names(found))
    bottom.set_xlabel(f"α, {found[0].direction}" if len(found) == 1 else "α")
    return top


def _contours(cell: Any, found: list[Plane]) -> None:
    ax = cell.subplots()
    add_bar(cell, ax, draw_contours(ax, found[0]))


def _surface(cell: Any, found: list[Plane]) -> None:
    ax = cell.add_subplot(projection="3d", computed_zorder=False)
    draw_surface(ax, found[0])


def _barriers(cell: Any, found: list[Barrier]) -> Any:
    ax = cell.subplots()
    draw_barriers(ax, found, [described(b) for b in found])
    ax.set_xlabel("α, from A to B")
    return ax


def _densities(cell: Any, found: list[Density]) -> Any:
    ax = cell.subplots()
    draw_densities(ax, found, density_names(found))
    ax.set_xlabel("eigenvalue")
    return ax


def _share(axes: Sequence[Any]) -> None:
    limits = np.array([ax.get_ylim() for ax in axes])
    for ax in axes:
        ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())
