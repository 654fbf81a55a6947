"""The loss along a line and over a plane through the model's weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from geomwatch.curvature.settings import LossFn
from geomwatch.errors import UsageError
from geomwatch.isolation.signals import traceless
from geomwatch.landscape.bar import Progress
from geomwatch.landscape.direction import (
    Direction,
    as_direction,
    cosine,
    layout_of,
    two_directions,
)
from geomwatch.landscape.evaluator import evaluating
from geomwatch.landscape.provenance import digest, provenance
from geomwatch.landscape.results import Floats, Plane, Slice
from geomwatch.landscape.scan import Scan, scan
from geomwatch.quantities.measurement import Measurement, check_how


@traceless
def slice_1d(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    direction: Direction | Tensor,
    how: Measurement | None = None,
    *,
    alphas: Sequence[float] | None = None,
    resume: str | Path | None = None,
    progress: Progress = False,
) -> Slice:
    """Return f(alpha) = L(w + alpha v) around the model's present weights.

    L is the mean of loss_fn(model, batch) over `batches`, weighted by items; it may be any number,
    an error rate too. Each evaluation replays one random state, so that dropout draws the same
    masks; `mode` "train" has BatchNorm use the statistics of the batch, "eval" the running ones.

    Costs a forward pass over `batches` for each point, by default 41 in [-1, 1], and two more. The
    model is left as it was, bit for bit, also by a KeyboardInterrupt.

    Args:
        batches: a list of batches or a DataLoader, gone through at each point.
        direction: a Direction, or one number for each trainable parameter.
        how: precision, mode, micro_batch and also count; which parameters move, `direction` says.
        resume: a file in which points are kept as they are evaluated; a call with the same
            arguments goes on where the last one was interrupted.
        progress: True for a bar on stderr, or a function of (points done, points in all).

    Raises:
        UsageError: direction, alphas or batches do not fit, or `resume` is of something else.

    Example:
        >>> import torch
        >>> model, loss_fn = nn.Linear(1, 1, bias=False), lambda m, x: m(x).square().mean()
        >>> _ = nn.init.ones_(model.weight)
        >>> line = slice_1d(model, loss_fn, [torch.ones(2, 1)], torch.ones(1), alphas=[-1, 0, 1])
        >>> line.losses
        array([0., 1., 4.])
    """
    v = as_direction(model, direction)
    axis = _grid("alphas", alphas, np.linspace(-1, 1, 41))
    found = _scan(model, loss_fn, batches, how, [v], [axis], resume, progress)
    return Slice(axis, found.losses, found.loss, v.label, found.nonfinite, found.provenance)


@traceless
def plane(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    directions: Sequence[Direction | Tensor],
    how: Measurement | None = None,
    *,
    alphas: Sequence[float] | None = None,
    betas: Sequence[float] | None = None,
    resume: str | Path | None = None,
    progress: Progress = False,
) -> Plane:
    """Return f(alpha, beta) = L(w + alpha v_1 + beta v_2) around the model's present weights.

    As `slice_1d`, with 25 points in [-1, 1] on each axis by default; `betas` are as `alphas` where
    they are left out. Two directions that are not orthogonal give an oblique picture; `provenance`
    has their cosine. Holds the two directions and one copy of the weights.

    Raises:
        UsageError: as `slice_1d`, and where the directions span no plane.

    Example:
        >>> import torch
        >>> model, loss_fn = nn.Linear(2, 1, bias=False), lambda m, x: m(x).square().mean()
        >>> _ = nn.init.ones_(model.weight)
        >>> found = plane(model, loss_fn, [torch.eye(2)], list(torch.eye(2)), alphas=[-1, 0, 1])
        >>> found.losses
        array([[0. , 0.5, 2. ],
               [0.5, 1. , 2.5],
               [2. , 2.5, 4. ]])
    """
    first, second = two_directions(model, directions)
    rows = _grid("alphas", alphas, np.linspace(-1, 1, 25))
    columns = _grid("betas", betas, rows)
    pair, axes = [first, second], [rows, columns]
    found = _scan(model, loss_fn, batches, how, pair, axes, resume, progress)
    losses = found.losses.reshape(len(rows), len(columns))
    labels = (first.label, second.label)
    return Plane(rows, columns, losses, found.loss, labels, found.nonfinite, found.provenance)


def _scan(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    how: Measurement | None,
    directions: Sequence[Direction],
    axes: Sequence[Floats],
    resume: str | Path | None,
    progress: Progress,
) -> Scan:
    how = check_how(how)
    origin = provenance(model, loss_fn)
    header: dict[str, Any] = {
        "kind": "slice" if len(axes) == 1 else "plane",
        "mode": how.mode,
        "grid": [axis.tolist() for axis in axes],
        "directions": [dict(v.facts) | {"label": v.label} for v in directions],
        "directions_digest": digest(v.vector for v in directions),
        "weights": origin["weights"],
    }
    if len(directions) == 2:
        header["cosine"] = cosine(directions[0], directions[1])
    layout = layout_of(model, directions[0].names)
    with evaluating(model, loss_fn, batches, how, layout) as evaluator:
        move = evaluator.mover([v.vector for v in directions])
        found = scan(
            lambda point: evaluator.loss(lambda: move(point)),
            list(itertools.product(*axes)),
            reference=(0.0,) * len(axes),
            header=header,
            resume=resume,
            progress=progress,
        )
    facts = {**origin, **found.provenance, **evaluator.facts}
    del facts["grid"]  # it is the result's own
    return Scan(found.losses, found.loss, facts)


def _grid(name: str, given: object, default: Floats) -> Floats:
    """Return the points of an axis.

    Raises:
        UsageError: they are not two or more finite numbers in ascending order.
    """
    values = default if given is None else given
    try:
        points = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.array(np.nan)
    if points.ndim != 1 or len(points) < 2 or not (np.diff(points) > 0).all():
        raise UsageError(
            f"{name} must be two or more finite numbers in ascending order, got {values!r}. "
            "For example numpy.linspace(-1, 1, 41)."
        )
    return points
