"""What a direction in weight space is, and whether it fits a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.vectors.layout import Layout

_PARALLEL = 1e-6  # of a cosine from 1


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """A vector in the space of some trainable parameters of a model."""

    vector: Tensor  # (D,), in units of weights
    names: tuple[str, ...]  # of the parameters, in the order in which they are laid out
    label: str
    facts: Mapping[str, Any]  # plain JSON: how it was obtained


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
    count = len(directions) if isinstance(directions, Sequence) else "none"
    if count != 2:
        raise UsageError(f"directions must be two, to span a plane, got {count}.")
    first, second = (as_direction(model, d) for d in directions)
    if first.names != second.names:
        raise UsageError("directions must be in the same parameters, got two different sets.")
    if abs(cosine(first, second)) > 1 - _PARALLEL:
        raise UsageError("directions must span a plane, got two that are parallel.")
    return first, second


def cosine(first: Direction, second: Direction) -> float:
    """Return the cosine of the angle between two directions."""
    norms = first.vector.norm() * second.vector.norm()
    return float(first.vector @ second.vector / norms)
