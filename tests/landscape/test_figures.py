"""Figures: drawn for every result, with what a reader has to know, and without a trace."""

from __future__ import annotations

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from landscapes import every_kind
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from geomwatch import landscape
from geomwatch.errors import UsageError
from geomwatch.landscape.results import Barrier, Density, Plane, Slice, Trajectory

AXIS = np.linspace(-1, 1, 11)
ODD = {"deterministic": False, "repeat_difference": 0.0123}


def some_plane(*, scale: float = 1.0, gaps: bool = False, how: dict | None = None) -> Plane:
    losses = 0.01 + scale * (AXIS[:, None] ** 2 + 0.3 * AXIS**2)
    if gaps:
        losses[:3, :4] = np.nan
        losses[-1, -1] = np.inf
    bad = int((~np.isfinite(losses)).sum())
    return Plane(AXIS, AXIS, losses, 0.01, ("one", "two"), bad, how or {})


def some_slice(losses: np.ndarray | None = None, how: dict | None = None) -> Slice:
    losses = AXIS**2 if losses is None else losses
    bad = int((~np.isfinite(losses)).sum())
    return Slice(AXIS, losses, 0.0, "filter-normalised random", bad, how or {})


def some_barrier(
    path: str = "linear", losses: np.ndarray | None = None, how: dict | None = None
) -> Barrier:
    a = np.linspace(0, 1, 11)
    losses = 0.1 + 4 * a * (1 - a) if losses is None else losses
    finite = np.isfinite(losses)
    top = float(losses[finite].max())
    at = float(a[np.where(finite, losses, -np.inf).argmax()])
    bad = int((~finite).sum())
    return Barrier(a, losses, path, False, 0.1, 0.1, top, at, top - 0.1, at, bad, losses, how or {})


def some_density(how: dict | None = None) -> Density:
    grid = np.linspace(-1, 9, 200)
    curve = np.exp(-(grid**2)) + 1e-4 * np.exp(-((grid - 6) ** 2))
    empty = np.empty((2, 3))
    none = np.empty(0)
    return Density(grid, curve, 0.5 * curve, empty, empty, none, 0.3, 100, 1.0, 0.1, 10, how or {})


def text_of(figure: Figure) -> str:
    found = [t.get_text() for t in figure.findobj(mpl.text.Text)]
    return "\n".join(found)


def saved(figure: Figure, tmp_path, kind: str = "png") -> bytes:
    path = tmp_path / f"figure.{kind}"
    figure.savefig(path)
    return path.read_bytes()


def test_every_result_has_a_figure(tmp_path):
    found = every_kind()
    figures = [
        landscape.plot_slice(found["slice"]),
        landscape.plot_plane(found["plane"]),
        landscape.plot_surface(found["plane"]),
        landscape.plot_barrier(found["barrier"]),
        landscape.plot_density(found["density"]),
    ]
    for figure in figures:
        assert isinstance(figure, Figure)
        assert saved(figure, tmp_path).startswith(b"\x89PNG")
        assert saved(figure, tmp_path, "pdf").startswith(b"%PDF")


def test_drawing_leaves_pyplot_and_the_look_of_the_caller_alone(tmp_path):
    plt.style.use("dark_background")
    before = dict(mpl.rcParams)
    try:
        figure = landscape.plot_slice(some_slice())
        assert dict(mpl.rcParams) == before
        assert plt.get_fignums() == []
        assert figure.get_facecolor() == (1, 1, 1, 1)
    finally:
        mpl.rcdefaults()
        mpl.use("Agg")


def test_a_slice_shows_its_fit_residual_and_direction():
    figure = landscape.plot_slice(some_slice(AXIS**2 + 0.1 * AXIS**3))
    text = text_of(figure)
    assert "quadratic fit" in text
    assert "residual" in text
    assert "α, filter-normalised random" in text
    _, bottom = figure.axes
    shown = bottom.lines[0].get_ydata()
    cubic = 0.1 * AXIS**3
    assert shown == pytest.approx(cubic - AXIS * (AXIS @ cubic) / (AXIS @ AXIS), abs=1e-12)
    assert "degree 3 fit" in text_of(landscape.plot_slice(some_slice(), degree=3))


def test_several_results_are_told_apart_by_colour_and_marker():
    figure = landscape.plot_slice(some_slice(), some_slice(2 * AXIS**2), labels=["a", "b"])
    dots = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    assert len({line.get_color() for line in dots}) == 2
    assert len({line.get_marker() for line in dots}) == 2
    figure = landscape.plot_barrier(some_barrier(), some_barrier("bezier"))
    assert {"straight", "Bezier"} <= set(text_of(figure).split("\n"))


def test_points_that_are_not_finite_are_gaps_and_counted():
    losses = AXIS**2
    losses[4], losses[5] = np.inf, np.nan
    figure = landscape.plot_slice(some_slice(losses))
    assert np.isnan(figure.axes[0].lines[0].get_ydata()).sum() == 2
    assert "2 points not finite" in text_of(figure)
    barrier = 0.1 + 4 * np.linspace(0, 1, 11) * np.linspace(1, 0, 11)
    barrier[3] = np.inf
    assert "1 point not finite" in text_of(landscape.plot_barrier(some_barrier(losses=barrier)))
    plane = some_plane(gaps=True)
    assert plane.nonfinite == 13
    for draw in (landscape.plot_plane, landscape.plot_surface):
        assert "13 points not finite" in text_of(draw(plane))
    hatched = landscape.plot_plane(plane).axes[0].patch.get_hatch()
    assert hatched


def test_no_path_is_cut_off_by_the_mark_of_the_first_ones_height():
    a = np.linspace(0, 1, 11)
    low, high = (some_barrier(losses=0.1 + h * a * (1 - a)) for h in (1, 8))
    (ax,) = landscape.plot_barrier(low, high).axes
    assert ax.get_ylim()[1] > high.max_loss


def test_a_loss_that_changes_with_the_call_is_marked():
    wanted = "loss differs by 0.012 from call to call"
    for figure in (
        landscape.plot_slice(some_slice(how=ODD)),
        landscape.plot_plane(some_plane(how=ODD)),
        landscape.plot_surface(some_plane(how=ODD)),
        landscape.plot_barrier(some_barrier(how=ODD)),
        landscape.plot_density(some_density(how=ODD)),
    ):
        assert wanted in text_of(figure)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("gaps", [False, True])
def test_levels_hold_the_whole_range_of_losses(scale, gaps, tmp_path):
    plane = some_plane(scale=scale, gaps=gaps)
    figure = landscape.plot_plane(plane)
    filled = figure.axes[0].collections[0]
    finite = plane.losses[np.isfinite(plane.losses)]
    # round numbers outside a narrow range, the range itself where it is wide
    assert filled.levels[0] <= finite.min() * (1 + 1e-12)
    assert filled.levels[-1] >= finite.max() * (1 - 1e-12)
    assert 3 <= len(filled.levels) <= 18
    assert saved(landscape.plot_surface(plane), tmp_path)


def test_a_flat_plane_can_be_drawn_and_an_empty_one_not(tmp_path):
    flat = Plane(AXIS, AXIS, np.full((11, 11), 0.7), 0.7, ("one", "two"), 0, {})
    saved(landscape.plot_plane(flat), tmp_path)
    saved(landscape.plot_surface(flat), tmp_path)
    nothing = Plane(AXIS, AXIS, np.full((11, 11), np.nan), 0.7, ("one", "two"), 121, {})
    with pytest.raises(UsageError, match="must have finite points to be drawn, got none"):
        landscape.plot_plane(nothing)


def test_numbers_of_a_surface_stay_away_from_the_corner_where_its_axes_meet():
    (ax,) = landscape.plot_surface(some_plane()).axes
    for ticks in (ax.get_xticks(), ax.get_yticks()):
        assert len(ticks) >= 2
        assert max(abs(ticks)) <= 0.8  # of an axis from -1 to 1


def test_a_cell_of_a_surface_has_the_colour_of_the_mean_of_its_corners():
    losses = np.array([[1.0, 2.0], [2.0, 3.0]])
    plane = Plane(np.array([0.0, 1.0]), np.array([0.0, 1.0]), losses, 1.0, ("one", "two"), 0, {})
    surface = landscape.plot_surface(plane).axes[0].collections[-1]
    shades = mpl.colormaps["cividis"](np.linspace(0, 1, 256))
    (found,) = surface.get_facecolors()
    nearest = np.abs(shades - found).sum(axis=1).argmin()
    assert nearest == pytest.approx(128, abs=4)  # 2, halfway between 1 and 3


def test_a_trajectory_is_drawn_on_its_own_plane_only():
    how = {"weights": "a", "directions_digest": "b"}
    way = np.array([[0.9, 0.5], [0.4, 0.1], [0.0, 0.0]])
    path = Trajectory(way, np.zeros(3), np.zeros(3), (0.9, 0.05), ("one", "two"), how)
    figure = landscape.plot_plane(some_plane(how=how), path)
    drawn = [line.get_xdata() for line in figure.axes[0].lines]
    assert any(np.array_equal(x, way[:, 0]) for x in drawn)
    assert "first state" in text_of(figure)
    for key, message in (("weights", "other weights"), ("directions_digest", "other directions")):
        with pytest.raises(UsageError, match=message):
            landscape.plot_plane(some_plane(how={**how, key: "other"}), path)


def test_nets_are_compared_side_by_side(tmp_path):
    results = [some_slice(), some_plane(), some_barrier(), some_density()]
    nets = {"MLP": results, "ResNet-18": results[:3], "Transformer": [*results, some_barrier()]}
    figure = landscape.plot_comparison(nets)
    assert set(nets) <= set(text_of(figure).split("\n"))
    assert saved(figure, tmp_path)
    assert figure.get_figwidth() == 7.0
    flat = landscape.plot_comparison(nets, surfaces=False)
    assert len(flat.axes) < len(figure.axes)
    low, high = some_barrier(), some_barrier(losses=np.linspace(0.1, 9, 11))
    shared = landscape.plot_comparison({"a": [low], "b": [high]}, share=True)
    assert len({ax.get_ylim() for ax in shared.axes}) == 1
    with pytest.raises(UsageError, match=r"must be .* got no result"):
        landscape.plot_comparison({"MLP": []})
    with pytest.raises(UsageError, match=r"must be .* got int"):
        landscape.plot_comparison({"MLP": [3]})


def test_labels_must_be_as_many_as_results():
    with pytest.raises(UsageError, match="labels must be one for each result, got 1, 2"):
        landscape.plot_barrier(some_barrier(), some_barrier(), labels=["a"])
    with pytest.raises(UsageError, match="needs at least one result, got none"):
        landscape.plot_density()


WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("matplotlib", "scipy"):
            raise ModuleNotFoundError(f"{name} is hidden", name=name)

sys.meta_path.insert(0, Absent())
import torch
from geomwatch import landscape

model = torch.nn.Linear(3, 1)
batches = [torch.ones(2, 3)]
found = landscape.slice_1d(
    model, lambda m, x: m(x).square().mean(), batches, landscape.random_direction(model)
)
print(len(found.losses))
try:
    landscape.plot_slice(found)
except ImportError as error:
    print(error)
"""


def test_computing_needs_no_extra_and_drawing_says_which():
    run = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    points, message = run.stdout.splitlines()
    assert points == "41"
    assert message == (
        "geomwatch.landscape.plot_slice needs matplotlib, which is not installed. "
        "Install it with: pip install 'geomwatch[landscape]'"
    )


def test_colours_are_told_apart_in_grey():
    """Those that a figure of three lines uses differ in lightness or are marked differently."""
    greys = torch.linspace(0, 1, 20)
    lightness = [
        np.dot(mpl.colormaps["cividis"](float(g))[:3], (0.299, 0.587, 0.114)) for g in greys
    ]
    assert np.all(np.diff(lightness) > 0)
