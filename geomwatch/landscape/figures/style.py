"""One look for all figures: colours that everybody can tell apart, sizes that survive print."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from geomwatch.landscape.results import Facts

P = ParamSpec("P")
R = TypeVar("R")

# Okabe and Ito 2008, in an order of falling contrast with white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY, INK, WARNING = "#8A8A8A", "#222222", "#D55E00"
MAP = "cividis"  # even in grey, and the same to those who don't see red or green
COLUMN, PAGE = 3.4, 7.0  # inches: one column of a paper, and two

_RC = {  # where matplotlib's own defaults are others
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **{f"{axis}tick.labelsize": 7 for axis in "xy"},
    **{f"{axis}tick.color": INK for axis in "xy"},
    **{f"{axis}tick.major.width": 0.7 for axis in "xy"},
    "legend.fontsize": 7,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.3,
    "lines.markersize": 3,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function with this look, whatever the caller's own is.

    Raises:
        ImportError: matplotlib is not installed.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(
                f"geomwatch.landscape.{draw.__name__} needs matplotlib, which is not installed. "
                "Install it with: pip install 'geomwatch[landscape]'"
            ) from error
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_RC)
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, in inches, that pyplot does not hold on to."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def remark(ax: Any, how: Facts, nonfinite: int = 0, *, inside: bool = False) -> None:
    """Write above an axis what its readers have to know before they trust it."""
    remarks = []
    if not how.get("deterministic", True):
        change = how.get("repeat_difference", float("nan"))
        remarks.append(f"loss differs by {change:.2g} from call to call")
    if nonfinite:
        remarks.append(f"{nonfinite} point{'s' * (nonfinite > 1)} not finite")
    if remarks:
        write = ax.text2D if inside else ax.text  # the latter has three coordinates in 3-D
        place = {"transform": ax.transAxes, "va": "top" if inside else "bottom"}
        write(0, 1.0 if inside else 1.01, "\n".join(remarks), fontsize=6.5, color=WARNING, **place)
