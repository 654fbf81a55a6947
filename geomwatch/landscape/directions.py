"""Directions in weight space to look along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature.checks import check_count
from geomwatch.curvature.micro_batches import check_micro_batches
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import LossFn
from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import choose_backend
from geomwatch.errors import UsageError
from geomwatch.estimators.lanczos import lanczos
from geomwatch.estimators.roughness import filter_normalised
from geomwatch.isolation.signals import traceless
from geomwatch.landscape.data import Batches
from geomwatch.landscape.direction import Direction, as_direction
from geomwatch.landscape.provenance import steadiness
from geomwatch.landscape.states import check_states
from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.measurement import Measurement, check_how
from geomwatch.vectors.layout import Layout, generator

_SCALES = ("filter", "layer", "unit")


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

    Args:
        params: shell-style patterns of the parameters to move; the others stay.

    Raises:
        UsageError: the scale is unknown, or the weights that it is taken from are all zero.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> v = random_direction(model, params="weight")
        >>> filters = v.vector.view(2, 3).norm(dim=1)
        >>> torch.allclose(filters, model.weight.norm(dim=1)), v.label
        (True, 'filter-normalised random')
    """
    if scale not in _SCALES:
        raise UsageError(f"scale must be one of {', '.join(_SCALES)}, got {scale!r}.")
    layout = Layout.of(model, params)
    rng = generator(seed)
    vector = filter_normalised(layout, rng) if scale == "filter" else layout.normal(rng)
    if scale == "layer":
        pairs = zip(vector.split(layout.sizes), layout.params, strict=True)
        vector = torch.cat([p.detach().to(v).norm() * v / v.norm() for v, p in pairs])
    if scale == "unit":
        vector = vector / vector.norm()
    if not bool(vector.any()):
        raise UsageError(
            f'scale="{scale}" needs weights that are not all zero'
            f'{" in two or more dimensions" if scale == "filter" else ""}. Use scale="unit".'
        )
    label = "unit random" if scale == "unit" else f"{scale}-normalised random"
    facts = {"kind": "random", "scale": scale, "seed": seed}
    return as_direction(model, Direction(vector, layout.names, label, facts))


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

    Raises:
        UsageError: a state does not fit, or they are the same.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> before, after = ({"weight": torch.tensor([pair])} for pair in ([1.0, 2.0], [1.5, 0.0]))
        >>> update_direction(model, before, after).vector
        tensor([ 0.5000, -2.0000])
    """
    check_states(model, before=before, after=after)
    layout = Layout.of(model, params)
    pairs = ((after[n], before[n]) for n in layout.names)
    like = {"device": layout.device, "dtype": layout.dtype}
    difference = layout.flatten(a.to(**like) - b.to(**like) for a, b in pairs)
    facts = {"kind": "update", "norm": float(difference.norm())}
    return as_direction(model, Direction(difference, layout.names, "update", facts))


@traceless
def gradient_direction(
    model: nn.Module, loss_fn: LossFn, batches: object, how: Measurement | None = None
) -> Direction:
    """Return g / ||g||, g the gradient of the mean loss over `batches`.

    Costs a gradient of each batch, and two forward passes to see whether the loss is steady; the
    norm is among the `facts`. Of `how` precision, mode, micro_batch, params and also count.

    Raises:
        UsageError: the gradient is zero or not finite.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> v = gradient_direction(model, lambda m, x: m(x).mean(), [torch.tensor([[3.0, 4.0]])])
        >>> v.vector, v.facts["norm"]
        (tensor([0.6000, 0.8000]), 5.0)
    """
    how = check_how(how)
    window = list(Batches(batches))
    subject = Subject(model, loss_fn, Layout.of(model, how.params), how, Ranks())
    check_micro_batches(subject, Batches(window).first())
    with subject.on(window) as objective:
        gradient, found = objective.gradient(), objective.provenance | _steady(objective)
    norm = float(gradient.norm())
    if not 0 < norm < float("inf"):
        raise UsageError(f"the gradient must be finite and not zero, got norm {norm:g}.")
    facts = {"kind": "gradient", "norm": norm, **found}
    return Direction(gradient / norm, subject.layout.names, "gradient", facts)


@traceless
def hessian_directions(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    how: Measurement | None = None,
    *,
    k: int = 2,
    max_hvps: int = 60,
    tol: float = 1e-3,
) -> tuple[Direction, ...]:
    """Return unit eigenvectors of the k largest eigenvalues of the Hessian, largest first.

    By Lanczos with re-orthogonalisation until the k residuals are below `tol` times their values,
    or `max_hvps` are spent; `facts` has eigenvalue, residual and whether it `converged`. Their
    sign makes the largest entry positive. Holds max_hvps + k vectors of size D.

    Args:
        how: operator ("ggn" for the Gauss-Newton matrix), hvp, precision, mode, micro_batch,
            params, also and seed count.

    Raises:
        UsageError: there are fewer than k eigenvalues.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batches = [torch.tensor([[3.0, 0.0], [0.0, 1.0]])]
        >>> (v,) = hessian_directions(model, lambda m, x: m(x).square().mean(), batches, k=1)
        >>> v.label, v.vector.round(decimals=3)
        ('eigenvector 1, λ = 9', tensor([1., 0.]))
    """
    how = check_how(how)
    check_count("k", k, 1)
    check_count("max_hvps", max_hvps, k)
    window = list(Batches(batches))
    layout = Layout.of(model, how.params)
    subject = Subject(model, loss_fn, layout, how, Ranks())
    subject, validation = choose_backend(subject, Batches(window).first())
    with subject.on(window) as objective:
        start = layout.normal(generator(how.seed))
        found = lanczos(
            objective.hvp, start, max_hvps=max_hvps, top=k, tol=tol, until=tuple(range(k))
        )
        shared = objective.provenance | validation | _steady(objective)
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
            "seed": how.seed,
            **shared,
        }
        signed: Tensor = y * torch.sign(y[y.abs().argmax()])
        made.append(Direction(signed, layout.names, f"eigenvector {i + 1}, λ = {value:.3g}", facts))
    return tuple(made)


def _steady(objective: Objective) -> dict[str, Any]:
    return steadiness(lambda: objective.loss_at(objective.layout.zeros()))[1]
