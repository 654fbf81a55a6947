"""Several nets side by side: a column for each, a row for each kind of landscape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geomwatch.errors import UsageError
from geomwatch.landscape.figures.lines import draw_barriers, draw_densities, draw_slices
from geomwatch.landscape.figures.style import PAGE, new_figure, styled
from geomwatch.landscape.figures.surfaces import draw_plane, draw_surface
from geomwatch.landscape.results import Barrier, Density, Plane, Slice

_ROWS: tuple[tuple[Any, float, Any], ...] = (  # kind, height in inches, what draws it
    (Slice, 2.3, draw_slices),
    (Plane, 2.1, lambda cell, found: draw_plane(cell, found[0])),
    (Plane, 2.1, lambda cell, found: draw_surface(cell, found[0])),
    (Barrier, 1.8, draw_barriers),
    (Density, 1.8, draw_densities),
)
_KINDS = (Slice, Plane, Barrier, Density)
_SURFACE = 2  # where among the rows


@styled
def plot_comparison(
    nets: Mapping[str, Sequence[object]], *, surfaces: bool = True, share: bool = False
) -> Any:
    """Draw slices, planes, barriers and densities of several nets, a column for each.

    As the paper's figures 1 to 3 in one: the slice with its fit and residual, the plane as contours
    and as a surface, the barrier, the density; what no net has is left out, what one lacks is
    blank. Several results of a kind are drawn into one axis (planes: the first). `share` gives each
    row of curves one scale; without it compare shapes, not heights.

    Returns a matplotlib Figure of a page's width, 2.3 inches a net at least.

    Raises:
        UsageError: there is no net, or something that is no result.

    Example:
        >>> alphas = np.linspace(-1, 1, 9)
        >>> lines = [Slice(alphas, k * alphas**2, 0.0, "mine", 0, {}) for k in (1, 2)]
        >>> figure = plot_comparison({"MLP": lines[:1], "ResNet": lines[1:]}, share=True)
        >>> len(figure.axes)  # a slice and its residual for each
        4
    """
    results = [result for found in nets.values() for result in found]
    unknown = [type(r).__name__ for r in results if not isinstance(r, _KINDS)]
    if not results or unknown:
        raise UsageError(
            "nets must be {name: [Slice, Plane, Barrier, Density, ...]}, got "
            f"{', '.join(unknown) or 'no result'}."
        )
    drawn = _ROWS if surfaces else (*_ROWS[:_SURFACE], *_ROWS[_SURFACE + 1 :])
    rows = [row for row in drawn if any(isinstance(r, row[0]) for r in results)]
    heights = [height for _, height, _ in rows]
    figure = new_figure(max(PAGE, 2.3 * len(nets)), sum(heights) + 0.3)
    bands = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (kind, _, draw), band in zip(rows, bands, strict=True):
        cells = band.subfigures(1, len(nets), squeeze=False)[0]
        axes = []
        for cell, (name, found) in zip(cells, nets.items(), strict=True):
            chosen = [result for result in found if isinstance(result, kind)]
            if chosen:
                axes.append(draw(cell, chosen))
            if band is bands[0]:
                cell.suptitle(name, fontsize=9.5, fontweight="bold")
        if share and kind is not Plane:
            _share(axes)
    return figure


def _share(axes: Sequence[Any]) -> None:
    limits = np.array([ax.get_ylim() for ax in axes])
    for ax in axes:
        ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())
