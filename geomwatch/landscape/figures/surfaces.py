"""Figures of two dimensions: a plane as contours, as a surface, and with a run drawn on it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from geomwatch.errors import UsageError
from geomwatch.landscape.figures.style import COLUMN, GREY, INK, MAP, new_figure, remark, styled
from geomwatch.landscape.results import Floats, Plane, Trajectory

_WIDE = 20.0  # a ratio of losses from which levels are spaced evenly in the logarithm
_LEVELS = 14
_STEPS = ((1, 1.5, 2, 3, 4, 5, 7), (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3))
_BRIGHT = 0.55  # of the colour map, above which lines are dark
_CORNER = 0.1  # of a 3-D axis, at its ends, where labels of two axes would meet
PATH = "#D55E00"


@styled
def plot_plane(plane: Plane, path: Trajectory | None = None) -> Any:
    """Draw a plane as filled contours, with the trajectory of a run if one is given.

    Levels are even in the loss, or in its logarithm where it spans a factor of 20. The star is
    where the weights are; what is not finite is hatched. Returns a matplotlib Figure of one
    column's width.

    Raises:
        UsageError: the trajectory is of another plane, or no point is finite.

    Example:
        >>> axis = np.linspace(-1, 1, 5)
        >>> bowl = Plane(axis, axis, axis[:, None] ** 2 + axis**2, 0.0, ("one", "two"), 0, {})
        >>> figure = plot_plane(bowl)
        >>> [ax.get_xlabel() for ax in figure.axes]
        ['α, one']
    """
    figure = new_figure(COLUMN, 2.8)
    ax = draw_plane(figure, plane)
    if path is not None:
        _draw_trajectory(ax, plane, path)
    return figure


@styled
def plot_surface(plane: Plane) -> Any:
    """Draw a plane as a surface over its contours, the height logarithmic where levels are.

    A cell has the colour of the mean of its corners. Returns a matplotlib Figure of one column's
    width.

    Raises:
        UsageError: no point is finite.

    Example:
        >>> axis = np.linspace(-1, 1, 5)
        >>> bowl = Plane(axis, axis, axis[:, None] ** 2 + axis**2, 0.0, ("one", "two"), 0, {})
        >>> plot_surface(bowl).axes[0].get_zlabel()
        'loss'
    """
    figure = new_figure(COLUMN, 3.0)
    draw_surface(figure, plane)
    return figure


def draw_plane(figure: Any, plane: Plane) -> Any:
    """Draw filled contours with labelled lines and a colour bar; return the axis."""
    ax = figure.subplots()
    losses = _masked(plane)
    levels, norm = _levels(losses)
    grid, options = (plane.alphas, plane.betas, losses.T), {"levels": levels, "norm": norm}
    ax.set_facecolor("#EDEDED")
    ax.patch.set_hatch("////" if plane.nonfinite else "")
    ax.patch.set_edgecolor(GREY)
    filled = ax.contourf(*grid, cmap=MAP, extend="neither", **options)
    colours = [INK if shade > _BRIGHT else "white" for shade in norm(levels)]
    lines = ax.contour(*grid, colors=colours, linewidths=0.4, **options)
    ax.clabel(lines, levels[1:-1:2], fontsize=5.5, fmt="%.3g", inline_spacing=2)
    ax.plot(0, 0, marker="*", ms=8, color="white", mec=INK, mew=0.7, zorder=5)
    ax.set_xlabel(f"α, {plane.directions[0]}")
    ax.set_ylabel(f"β, {plane.directions[1]}")
    ax.set_box_aspect(1)
    ax.locator_params(nbins=5)
    ax.set_xlim(plane.alphas[0], plane.alphas[-1])
    ax.set_ylim(plane.betas[0], plane.betas[-1])
    ax.spines[["top", "right"]].set_visible(True)
    remark(ax, plane.provenance, plane.nonfinite)
    _add_bar(figure, ax, filled)
    return ax


def draw_surface(figure: Any, plane: Plane) -> Any:
    """Draw a surface and its contours on the floor into a 3-D axis."""
    from matplotlib import colormaps

    ax = figure.add_subplot(projection="3d", computed_zorder=False)
    losses = _masked(plane)
    levels, norm = _levels(losses)
    heights = np.log10(losses) if _is_wide(losses) else losses
    a, b = np.meshgrid(plane.alphas, plane.betas, indexing="ij")
    low, high = float(heights.min()), float(heights.max())
    height = max(high - low, 1e-6 * max(abs(high), 1.0))  # of a flat plane too
    floor = low - 0.35 * height
    options = {"zdir": "z", "offset": floor, "cmap": MAP, "linewidths": 0.7}
    ax.contour(a, b, losses.filled(np.nan), levels=levels, norm=norm, **options)
    cells = _cells(np.stack([a, b, heights.filled(np.nan), norm(losses).filled(np.nan)], -1))
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    # Not by plot_surface: it keeps the corners that are left of a broken cell, and projects what
    # happens to be in memory for the missing ones.
    edges = {"linewidths": 0.15, "edgecolors": (1, 1, 1, 0.35), "antialiased": True}
    colours = colormaps[MAP](cells[:, :, 3].mean(1))
    ax.add_collection3d(Poly3DCollection(cells[:, :, :3], facecolors=colours, **edges))
    ax.set_xlim(plane.alphas[0], plane.alphas[-1])
    ax.set_ylim(plane.betas[0], plane.betas[-1])
    ax.set_zlim(floor, low + height)
    _label_axes(ax, losses)
    remark(ax, plane.provenance, plane.nonfinite, inside=True)
    return ax


def _add_bar(figure: Any, ax: Any, filled: Any) -> None:
    """Draw the colour bar of filled contours, with plain numbers at every other level."""
    beside = ax.inset_axes((1.04, 0.0, 0.045, 1.0))  # as high as the plane, whatever the layout
    bar = figure.colorbar(filled, cax=beside)
    bar.outline.set_linewidth(0.5)
    bar.minorticks_off()
    levels = filled.levels
    shown = levels[1:-1:2] if len(levels) > 6 else levels
    bar.set_ticks(shown, labels=[f"{x:.3g}" for x in shown])
    bar.ax.set_title("loss", fontsize=7, pad=4)


def _draw_trajectory(ax: Any, plane: Plane, path: Trajectory) -> None:
    """Draw the states of a run, first to last, on the contours of its plane."""
    for key, what in (("weights", "weights at its centre"), ("directions_digest", "directions")):
        if plane.provenance.get(key) != path.provenance.get(key):
            raise UsageError(
                f"path must be of the same plane, got other {what}. Make both with the "
                "same model and directions."
            )
    x, y = path.coordinates.T
    ax.plot(x, y, "-", color="white", lw=2.4, solid_capstyle="round", zorder=3)
    ax.plot(x, y, "-", color=PATH, lw=1.2, marker="o", ms=2.4, mec="white", mew=0.3, zorder=4)
    ends = {"color": PATH, "mec": "white", "mew": 0.7, "lw": 0, "zorder": 5, "ms": 5}
    ax.plot(x[0], y[0], marker="s", label="first state", **ends)
    ax.plot(x[-1], y[-1], marker="o", label="last state", **ends)
    above = {"loc": "lower left", "bbox_to_anchor": (-0.03, 1.0), "borderaxespad": 0.1}
    ax.legend(ncols=2, handletextpad=0.1, columnspacing=1.0, **above)


def _cells(points: Floats) -> Floats:
    """Return the cells of a grid whose four corners are all there."""  # (n, m, k) -> (c, 4, k)
    corners = points[:-1, :-1], points[1:, :-1], points[1:, 1:], points[:-1, 1:]
    cells = np.stack(corners, -2).reshape(-1, 4, points.shape[-1])
    return cells[np.isfinite(cells).all((1, 2))]


def _label_axes(ax: Any, losses: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis, label in ((ax.xaxis, "α"), (ax.yaxis, "β"), (ax.zaxis, "loss")):
        axis.set_label_text(label, fontsize=7)
        axis.labelpad = -2 if axis is ax.zaxis else -7
        axis.pane.set_facecolor("white")
        axis.pane.set_edgecolor("#CCCCCC")
        axis._axinfo["grid"].update(color="#E4E4E4", linewidth=0.5)
        low, high = sorted(axis.get_view_interval())
        room = 0.0 if axis is ax.zaxis else _CORNER * (high - low)
        ticks = MaxNLocator(4).tick_values(low, high)
        axis.set_ticks([t for t in ticks if low + room <= t <= high - room] or [(low + high) / 2])
    ax.zaxis.set_rotate_label(False)
    ax.zaxis.label.set_rotation(90)  # else it leaves the figure on the right
    ax.tick_params(pad=-3, labelsize=6)
    ax.tick_params(axis="z", pad=-1)
    if _is_wide(losses):
        ax.set_zticks(np.log10(_round(float(losses.min()), float(losses.max()), 6)))
        ax.zaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10.0**value:.2g}"))
    ax.set_box_aspect((1, 1, 0.75), zoom=0.84)
    ax.view_init(elev=30, azim=-58)


def _masked(plane: Plane) -> Any:
    losses = np.ma.masked_invalid(plane.losses)
    if losses.mask.all():
        raise UsageError("a plane must have finite points to be drawn, got none.")
    return np.ma.array(losses, mask=np.ma.getmaskarray(losses))


def _is_wide(losses: Any) -> bool:
    return bool(losses.min() > 0 and losses.max() / losses.min() > _WIDE)


def _levels(losses: Any) -> tuple[Floats, Any]:
    """Round levels that hold all losses, and the scale of colours that fits them."""
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import MaxNLocator

    low, high = float(losses.min()), float(losses.max())
    if _is_wide(losses):
        return np.array([low, *_round(low, high, _LEVELS), high]), LogNorm(low, high)
    if high <= low:
        high = low + max(abs(low), 1.0) * 1e-6
    ticks = MaxNLocator(_LEVELS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    levels = np.asarray(ticks, dtype=np.float64)
    return levels, Normalize(levels[0], levels[-1])


def _round(low: float, high: float, most: int) -> list[float]:
    """Round numbers m 10^k between two bounds, as many as there may be."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / most)
    for steps in (*_STEPS, (1,)) if stride == 1 else ((1,),):
        every = (m * 10.0**k for k in range(first, last + 1, stride) for m in steps)
        found = [x for x in every if 1.05 * low < x < high / 1.05]
        if len(found) <= most:
            break
    return found
