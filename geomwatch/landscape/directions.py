"""Directions in weight space to look along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature.checks import check_count
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import LossFn, Settings
from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import choose_backend
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.estimators.directions import filter_normalised
from geomwatch.estimators.lanczos import lanczos
from geomwatch.landscape.data import Batches
from geomwatch.landscape.provenance import steadiness
from geomwatch.landscape.states import check_states
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import Layout, generator

_SCALES = ("filter", "layer", "unit")


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A vector in the space of some trainable parameters of a model."""

    vector: Tensor  # (D,)
    names: tuple[str, ...]  # of the parameters, in the order in which they are laid out
    label: str
    facts: Mapping[str, Any]  # plain JSON: how it was obtained


def random_direction(
    model: nn.Module,
    *,
    scale: str = "filter",
    seed: int = 0,
    params: str | Sequence[str] | None = None,
) -> Direction:
    """Draw a Gaussian direction, scaled so that slices of different nets can be compared.

    `scale` "filter": every filter is as long as that of the weights, biases and normalisation
    scales stay (Li et al. 2018), so that alpha = 1 moves each filter by its own length. "layer":
    the same by whole tensors, all of them. "unit": ||v|| = 1, the paper's directions, along which
    a net of many weights hardly changes.
    """
    if scale not in _SCALES:
        raise UsageError(f"scale must be one of {', '.join(_SCALES)}, got {scale!r}.")
    layout = Layout.of(model, params)
    rng = generator(seed)
    vector = filter_normalised(layout, rng) if scale == "filter" else layout.normal(rng)
    if scale == "layer":
        pairs = zip(vector.split([p.numel() for p in layout.params]), layout.params, strict=True)
        vector = torch.cat([p.detach().to(v).norm() * v / v.norm() for v, p in pairs])
    if scale == "unit":
        vector = vector / vector.norm()
    if not bool(vector.any()):
        raise UsageError(
            f'scale="{scale}" needs weights that are not all zero'
            f'{" in two or more dimensions" if scale == "filter" else ""}. Use scale="unit".'
        )
    label = {"unit": "unit random"}.get(scale, f"{scale}-normalised random")
    facts = {"kind": "random", "scale": scale, "seed": seed}
    return as_direction(model, Direction(vector, layout.names, label, facts))


def gradient_direction(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    *,
    mode: str = "train",
    params: str | Sequence[str] | None = None,
    also: nn.Module | Sequence[object] = (),
    precision: str = "float32",
) -> Direction:
    """Return g / ||g||, g the gradient of the mean loss over `batches`. One gradient of each."""
    layout = Layout.of(model, params)
    window = list(Batches(batches))
    settings = Settings(mode=mode, also=also, precision=precision)  # type: ignore[arg-type]
    with Objective(model, loss_fn, window, settings, layout=layout) as objective:
        gradient, how = objective.gradient(), objective.provenance | _steady(objective)
    norm = float(gradient.norm())
    if not 0 < norm < float("inf"):
        raise UsageError(f"the gradient must be finite and not zero, got norm {norm:g}.")
    facts = {"kind": "gradient", "norm": norm, **how}
    return Direction(gradient / norm, layout.names, "gradient", facts)


def update_direction(
    model: nn.Module,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    *,
    params: str | Sequence[str] | None = None,
) -> Direction:
    """Return after - before, the difference of two states, in the trainable parameters.

    Not scaled: a slice around `before` reaches `after` at alpha = 1. Buffers stay those of the
    model; `barrier` interpolates them.
    """
    check_states(model, before=before, after=after)
    layout = Layout.of(model, params)
    pairs = ((after[n], before[n]) for n in layout.names)
    like = {"device": layout.device, "dtype": layout.dtype}
    difference = layout.flatten(a.to(**like) - b.to(**like) for a, b in pairs)
    facts = {"kind": "update", "norm": float(difference.norm())}
    return as_direction(model, Direction(difference, layout.names, "update", facts))


def hessian_directions(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    *,
    k: int = 2,
    max_hvps: int = 60,
    tol: float = 1e-3,
    mode: str = "train",
    params: str | Sequence[str] | None = None,
    also: nn.Module | Sequence[object] = (),
    hvp: str = "auto",
    precision: str = "float32",
    seed: int = 0,
) -> tuple[Direction, ...]:
    """Return unit eigenvectors of the k largest eigenvalues of the Hessian, largest first.

    By Lanczos with re-orthogonalisation until the k residuals are below `tol` times their values,
    or `max_hvps` are spent; `facts` has eigenvalue, residual and whether it `converged`. Their
    sign makes the largest entry positive. Holds max_hvps + k vectors of size D.
    """
    check_count("k", k, 1)
    check_count("max_hvps", max_hvps, k)
    window = list(Batches(batches))
    layout = Layout.of(model, params)
    settings = Settings(mode=mode, also=also, hvp=hvp, precision=precision)  # type: ignore[arg-type]
    subject = Subject(model, loss_fn, layout, settings, Ranks())
    subject, validation = choose_backend(subject, Batches(window).first())
    with subject.on(window) as objective:
        start = layout.normal(generator(seed))
        found = lanczos(
            objective.hvp, start, max_hvps=max_hvps, top=k, tol=tol, until=tuple(range(k))
        )
        how = objective.provenance | validation | _steady(objective)
    if len(found.values) < k:
        raise UsageError(f"k must be at most the {layout.dim} parameters, got {k}.")
    made = []
    for i, y in enumerate(found.vectors):
        value, residual = found.values[i], found.residuals[i]
        facts = {
            "kind": "eigenvector",
            "index": i + 1,
            "eigenvalue": value,
            "residual": residual,
            "converged": residual <= tol * abs(value),
            "hvps": found.hvps,
            "seed": seed,
            **how,
        }
        signed = y * torch.sign(y[y.abs().argmax()])
        made.append(Direction(signed, layout.names, f"eigenvector {i + 1}, λ = {value:.3g}", facts))
    return tuple(made)


def _steady(objective: Objective) -> dict[str, Any]:
    return steadiness(lambda: objective.loss_at(objective.layout.zeros()))[1]


def as_direction(model: nn.Module, given: object) -> Direction:
    """Return a direction that fits the model, of a Direction or a vector over all its parameters.

    Raises:
        UsageError: it has another size, names other parameters, is zero or is not finite.
    """
    if isinstance(given, Tensor):
        given = Direction(given.detach(), Layout.of(model).names, "given", {"kind": "given"})
    if not isinstance(given, Direction):
        raise UsageTypeError(
            "direction must be a Direction or a tensor with one number for each trainable "
            f"parameter, got {type(given).__name__}. random_direction(model) makes one."
        )
    layout = layout_of(model, given.names)
    if given.vector.shape != (layout.dim,):
        raise UsageError(
            f"direction must have shape ({layout.dim},), one number for each trainable parameter, "
            f"got {tuple(given.vector.shape)}. Is it of this model?"
        )
    vector = given.vector.to(layout.device, layout.dtype)
    norm = float(vector.norm())
    if not 0 < norm < float("inf"):
        raise UsageError(f"direction must be finite and not zero, got norm {norm:g}.")
    return Direction(vector, given.names, given.label, given.facts)


def layout_of(model: nn.Module, names: Sequence[str]) -> Layout:
    """Return the layout of named parameters."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n in names if n not in params]
    if missing:
        raise UsageError(
            f"direction must name trainable parameters of the model, got {', '.join(missing[:5])}. "
            "Make it from this model, with the same parameters frozen."
        )
    return Layout(tuple(names), tuple(params[n] for n in names))


def two_directions(model: nn.Module, directions: Sequence[object]) -> tuple[Direction, Direction]:
    """Return two directions that span a plane, in the same parameters.

    Raises:
        UsageError: they are not two, name different parameters, or are parallel.
    """
    if not isinstance(directions, Sequence) or len(directions) != 2:
        count = len(directions) if isinstance(directions, Sequence) else "none"
        raise UsageError(f"directions must be two, to span a plane, got {count}.")
    first, second = (as_direction(model, d) for d in directions)
    if first.names != second.names:
        raise UsageError("directions must be in the same parameters, got two different sets.")
    if abs(cosine(first, second)) > 1 - 1e-6:
        raise UsageError("directions must span a plane, got two that are parallel.")
    return first, second


def cosine(first: Direction, second: Direction) -> float:
    """Return the cosine of the angle between two directions."""
    norms = first.vector.norm() * second.vector.norm()
    return float(first.vector @ second.vector / norms)
