"""The path of a run through weight space, and the plane that shows most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.curvature.checks import check_count
from geomwatch.errors import UsageError
from geomwatch.landscape.direction import Direction, layout_of, two_directions
from geomwatch.landscape.provenance import digest, weights_digest
from geomwatch.landscape.results import Floats, Trajectory
from geomwatch.landscape.states import State, check_states
from geomwatch.vectors.layout import Layout

_RANK = 1e-10  # of the largest eigenvalue: below it there is no second direction


def pca_directions(
    model: nn.Module, states: Sequence[State], *, params: str | Sequence[str] | None = None
) -> tuple[Direction, Direction]:
    """Return the two unit directions that carry most of a run's distance from the present weights.

    The first two right singular vectors of the differences theta_i - w, w the model's weights,
    which are usually those of the run's end (Li et al. 2018). `facts` has the share of the squared
    distances that each one explains. The first state lies at positive coordinates. Holds one
    parameter of all states at a time, in float64 on the CPU; no evaluations.

    Args:
        states: state_dicts of the run, copied at the time.
        params: shell-style patterns of the parameters that count.

    Raises:
        UsageError: a state does not fit, or they all lie on one line through the weights.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> at = model.weight.detach()
        >>> steps = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> first, second = pca_directions(model, [{"weight": at + step} for step in steps])
        >>> first.label, second.label
        ('principal component 1 (90%)', 'principal component 2 (10%)')
    """
    layout = Layout.of(model, params)
    _check(model, states, least=2)
    gram = sum(_gram(m) for m in _differences(layout, states))
    values, weights = np.linalg.eigh(gram)
    values, weights = values[::-1], weights[:, ::-1]
    if not values[1] > _RANK * values[0] > 0:
        raise UsageError(
            f"states must span a plane around the model's weights, got {len(states)} states "
            "on one line through them. Pass more of the run's checkpoints."
        )
    scaled = weights[:, :2] * np.where(weights[0, :2] < 0, -1.0, 1.0) / np.sqrt(values[:2])
    rows = torch.from_numpy(scaled.T.copy())  # (2, states)
    pieces = [rows @ m for m in _differences(layout, states)]
    vectors = torch.cat(pieces, dim=1).to(layout.device, layout.dtype)
    shares = (values[:2] / values.sum()).tolist()
    made = [
        Direction(
            vector,
            layout.names,
            f"principal component {i} ({share:.0%})",
            {"kind": "pca", "index": i, "explained": share, "states": len(states)},
        )
        for i, (vector, share) in enumerate(zip(vectors, shares, strict=True), 1)
    ]
    return made[0], made[1]


def trajectory(
    model: nn.Module, states: Sequence[State], directions: Sequence[Direction | Tensor]
) -> Trajectory:
    """Project states on the plane of two directions through the model's present weights.

    Orthogonally, also where the directions are not orthogonal to one another: coordinates (a, b)
    minimise ||theta - w - a v_1 - b v_2||, `off_plane` is what is left of it. No evaluations.

    Raises:
        UsageError: a state or the directions do not fit.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> state = {"weight": model.weight + torch.tensor([[3.0, -1.0, 2.0]])}
        >>> path = trajectory(model, [state], list(torch.eye(3)[:2]))
        >>> path.coordinates.round(3).tolist(), path.off_plane.round(3).tolist()
        ([[3.0, -1.0]], [2.0])
    """
    first, second = two_directions(model, directions)
    layout = layout_of(model, first.names)
    _check(model, states, least=1)
    plane = torch.stack([first.vector, second.vector]).cpu().double()
    sizes = [p.numel() for p in layout.params]
    dots = torch.zeros(len(states), 2, dtype=torch.float64)
    squares = torch.zeros(len(states), dtype=torch.float64)
    for m, piece in zip(_differences(layout, states), plane.split(sizes, dim=1), strict=True):
        dots += m @ piece.T
        squares += m.square().sum(dim=1)
    coordinates = torch.linalg.solve(plane @ plane.T, dots.T).T
    along = (coordinates * dots).sum(dim=1)  # squared length of the projections
    total = max(float(squares.sum()), torch.finfo(torch.float64).tiny)
    share = float((dots[:, 0] ** 2).sum() / plane[0].square().sum()) / total
    return Trajectory(
        coordinates=coordinates.numpy(),
        off_plane=(squares - along).clamp_min(0).sqrt().numpy(),
        distance=squares.sqrt().numpy(),
        explained=(share, float(along.sum()) / total - share),
        directions=(first.label, second.label),
        provenance={
            "weights": weights_digest(model),
            "directions_digest": digest([first.vector, second.vector]),
            "states": len(states),
        },
    )


def grid_around(
    path: Trajectory, *, points: int = 25, margin: float = 0.25
) -> tuple[Floats, Floats]:
    """Return alphas and betas of a plane that holds a trajectory and its centre, with a margin.

    Args:
        margin: on each side, in units of the trajectory's extent along that axis.

    Raises:
        UsageError: there are fewer than two points on an axis.

    Example:
        >>> way = np.array([[8.0, 0.0], [0.0, 4.0]])
        >>> path = Trajectory(way, np.zeros(2), np.zeros(2), (0.8, 0.2), ("one", "two"), {})
        >>> alphas, betas = grid_around(path, points=3)
        >>> alphas.tolist(), betas.tolist()
        ([-2.0, 4.0, 10.0], [-1.0, 2.0, 5.0])
    """
    check_count("points", points, 2)
    low = np.minimum(path.coordinates.min(axis=0), 0.0)
    high = np.maximum(path.coordinates.max(axis=0), 0.0)
    room = margin * np.maximum(high - low, 0.1 * (high - low).max())
    a, b = np.linspace(low - room, high + room, points).T
    return a, b


def _check(model: nn.Module, states: Sequence[State], *, least: int) -> None:
    if isinstance(states, Mapping) or not isinstance(states, Sequence) or len(states) < least:
        found = len(states) if isinstance(states, Sequence) else type(states).__name__
        raise UsageError(f"states must be a list of at least {least} state_dicts, got {found}.")
    check_states(model, **{f"states[{i}]": state for i, state in enumerate(states)})


def _differences(layout: Layout, states: Sequence[State]) -> Iterator[Tensor]:
    """Yield theta_i - w for one parameter of all states at a time, (states, its size)."""
    for name, p in zip(layout.names, layout.params, strict=True):
        center = p.detach().cpu().double().reshape(-1)
        rows = [state[name].detach().cpu().double().reshape(-1) - center for state in states]
        yield torch.stack(rows)


def _gram(rows: Tensor) -> Any:
    return (rows @ rows.T).numpy()
