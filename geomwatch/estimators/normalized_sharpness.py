"""Normalized sharpness: how far the loss rises when weights move in proportion to themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from geomwatch.estimators.noise_floor import Readout
from geomwatch.records import Estimate
from geomwatch.vectors.layout import Layout

Extreme: TypeAlias = Callable[[Tensor], Tensor]  # direction of ascent -> u, in one tensor


class Ascendable(Protocol):
    """What the ascent asks of an objective."""

    layout: Layout

    def loss_at(self, displacement: Tensor) -> float:
        """Return L(w + displacement)."""

    def gradient(self) -> Tensor:
        """Return the gradient at w, (D,)."""

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return the gradient at w + displacement, (D,)."""


def normalized_sharpness(
    objective: Ascendable,
    readout: Readout,
    *,
    rng: torch.Generator,
    eps: float = 1e-2,
    steps: int = 3,
) -> Estimate:
    """Return NS = max_u L(w + dw) - L(w) with dw_l = eps u_l * |w_l| and ||u_l||_2 = 1.

    The paper's ball, one unit vector u_l for each weight tensor l, in units of loss. Scaling a
    layer by c and the next by 1/c, which a ReLU net does not feel, leaves it as it is. A weight
    moves by about eps / sqrt(n_l) of itself, so NS falls with the width: never compare it across
    models, nor with an absolute limit.

    Found by conditional-gradient ascent, u_l <- a_l / ||a_l|| with a_l = |w_l| * grad_l at the
    present point, the exact maximum of the linearised problem (as ASAM, Kwon et al. 2021, with
    its norm by tensor). It starts from the best of +a, -a (better where curvature outweighs
    slope) and a random u (all there is where a = 0), and keeps the best point seen: a lower
    bound of the maximum, without an error bar; in digits MLPs 3 steps reach 96-100 % of what 50 do.
    Can be negative near a strict maximum. Tensors of one dimension and biases stay; all-zero
    tensors can't move (the reason lists them). Costs `steps` gradients and `steps` + 3 forward
    passes, no HVPs.

    Withheld where two evaluations of the same point differ beyond rounding, where no tensor can
    move, and where the rise is no larger than the noise floor of the loss.

    Raises:
        ValueError: `eps` or `steps` is not positive.
    """
    return _rise(objective, readout, _on_sphere, solid=False, rng=rng, eps=eps, steps=steps)


def normalized_sharpness_linf(
    objective: Ascendable,
    readout: Readout,
    *,
    rng: torch.Generator,
    eps: float = 1e-2,
    steps: int = 5,
) -> Estimate:
    """Return NS_inf = max L(w + dw) - L(w) over |dw_i| <= eps |w_i|.

    As `normalized_sharpness` in ascent, cost and what is withheld, in the ball in which every
    weight may move by the share eps of itself (ASAM's infinity norm, Kwon et al. 2021): u = sign(a)
    at its corners. It does not fall with the width as the paper's ball does. Never negative:
    u = 0 belongs to this ball. In digits MLPs 5 steps reach 89-100 % of what 50 do, 3 80-100 %.
    """
    return _rise(objective, readout, torch.sign, solid=True, rng=rng, eps=eps, steps=steps)


def _on_sphere(a: Tensor) -> Tensor:
    length: Tensor = a.norm().clamp_min(torch.finfo(a.dtype).tiny)
    return a / length


def _rise(
    objective: Ascendable,
    readout: Readout,
    extreme: Extreme,
    *,
    solid: bool,
    rng: torch.Generator,
    eps: float,
    steps: int,
) -> Estimate:
    if eps <= 0 or steps < 1:
        raise ValueError(f"eps and steps must be positive, got eps={eps!r}, steps={steps!r}")
    layout = objective.layout
    radius, frozen = _radius(layout, eps)
    reason = readout.reason or _immovable(radius, frozen)
    if reason:
        return Estimate(None, status="withheld", reason=reason)
    noise = layout.normal(rng)

    def corner(a: Tensor) -> Tensor:
        """The displacement that is furthest along a; at random in tensors where a is zero."""
        pairs = zip(_pieces(layout, radius * a), _pieces(layout, radius * noise), strict=True)
        return radius * torch.cat([extreme(p if bool(p.any()) else n) for p, n in pairs])

    gradient = objective.gradient()
    seen = [(objective.loss_at(d), d) for d in map(corner, (gradient, -gradient, noise))]
    point = max(seen, key=lambda pair: pair[0])[1]
    losses = [loss for loss, _ in seen] + [readout.loss] * solid
    for _ in range(steps):
        point = corner(objective.gradient_at(point))
        losses.append(objective.loss_at(point))
    how = f"a lower bound of the maximum: {steps} ascent steps, eps {eps:g}"
    return _judged(max(losses) - readout.loss, readout, how, frozen)


def _radius(layout: Layout, eps: float) -> tuple[Tensor, tuple[str, ...]]:
    """How far each weight may move for u = 1, and which tensors cannot because they are zero."""
    still = {
        name
        for name, p in zip(layout.names, layout.params, strict=True)
        if p.dim() < 2 or name.endswith("bias")
    }
    radius = eps * layout.values().abs() * layout.mask(still)
    named = zip(layout.names, _pieces(layout, radius), strict=True)
    return radius, tuple(n for n, r in named if n not in still and not bool(r.any()))


def _pieces(layout: Layout, vector: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = vector.split(layout.sizes)
    return pieces


def _immovable(radius: Tensor, frozen: tuple[str, ...]) -> str:
    if bool(radius.any()):
        return ""
    zero = f" and {', '.join(frozen)} all zero" if frozen else ""
    return f"no weight can move: biases and tensors of one dimension stay{zero}"


def _judged(rise: float, readout: Readout, how: str, frozen: tuple[str, ...]) -> Estimate:
    if not math.isfinite(rise):
        return Estimate(None, status="withheld", reason="the loss is not finite within the ball")
    if abs(rise) <= readout.floor:
        reason = f"the rise ({rise:.2g}) is below the noise floor of the loss ({readout.floor:.2g})"
        return Estimate(None, status="withheld", reason=reason)
    if frozen:
        how += f"; all zero, so they never move: {', '.join(frozen)}"
    return Estimate(rise, reason=how)
