"""What a landscape is: frozen data, which `save` writes and `load` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

Floats: TypeAlias = npt.NDArray[np.float64]
Facts: TypeAlias = Mapping[str, Any]  # plain JSON


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """The loss along one direction, L(w + alpha v).

    Points at which the loss is not finite keep their NaN or infinity and are counted.
    """

    alphas: Floats  # (n,)
    losses: Floats  # (n,)
    loss: float  # L(w)
    direction: str
    nonfinite: int
    provenance: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Plane:
    """The loss over a plane, losses[i, j] = L(w + alphas[i] v_1 + betas[j] v_2)."""

    alphas: Floats  # (n,)
    betas: Floats  # (m,)
    losses: Floats  # (n, m)
    loss: float  # L(w)
    directions: tuple[str, str]
    nonfinite: int
    provenance: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """States of a run, projected on the plane of two directions around the present weights."""

    coordinates: Floats  # (states, 2), in units of the directions
    off_plane: Floats  # (states,), distance from the plane
    distance: Floats  # (states,), distance from the centre
    explained: tuple[float, ...]  # share of the squared distances that lies along each direction
    directions: tuple[str, str]
    provenance: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Barrier:
    """The loss on a path between two states, alpha from 0 at A to 1 at B.

    `max_loss` is B = max L on the path, ends included. `height` is what the path rises at most
    above the straight line between the losses at its ends. Both are over the finite points: lower
    bounds where `nonfinite` is not 0, None where no point is finite.
    """

    alphas: Floats  # (n,)
    losses: Floats  # (n,)
    path: str  # "linear" or "bezier"
    aligned: bool  # whether the units of B were permuted to match those of A
    loss_a: float
    loss_b: float
    max_loss: float | None
    argmax: float | None  # alpha of max_loss
    height: float | None
    argmax_height: float | None  # alpha of height
    nonfinite: int
    straight: Floats  # (n,), the losses on the straight path: `losses` itself unless it is bent
    provenance: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """The path (1-t)^2 A + 2 t (1-t) control + t^2 B, t from 0 at A to 1 at B."""

    control: Mapping[str, Tensor]  # a state of the model
    losses: Floats  # (steps,), of the training
    provenance: Facts


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """The density of the Hessian's eigenvalues, smoothed by Gaussians of width sigma.

    The curve as a whole lies within density +- error, at 95 %.
    """

    grid: Floats  # (n,), eigenvalues
    density: Floats  # (n,), integrates to 1
    error: Floats  # (n,)
    nodes: Floats  # (vectors, steps), Ritz values of each random vector; NaN where it had fewer
    weights: Floats  # (vectors, steps), which add up to 1 - len(exact) / D for each
    exact: Floats  # (k,), the eigenvalues that are known one by one
    sigma: float
    dim: int  # D
    trace: float  # D times the mean eigenvalue
    trace_error: float  # one standard error
    hvps: int
    provenance: Facts


Result: TypeAlias = Slice | Plane | Trajectory | Barrier | Density
