"""Does double backward give the derivative of the gradient? Some code makes it silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from geomwatch.isolation.signals import traceless
from geomwatch.vectors.layout import Layout, generator

# Of the gradient: the smallest step crosses no kink. But a model may compute parts of itself in
# float32, whatever its parameters (as an RMSNorm does): then it drowns in rounding.
_SHARES = (1e-6, 1e-4, 1e-3, 1e-2)
_LARGEST_STEP = 0.1

_CLEAR = 1e-6  # an error at which no other step need be tried
_TOLERANCE = 1e-4  # what zoo models with parts in float32 reach
_LARGEST_TOLERANCE = 1e-2  # where differences can tell no better
_ASYMMETRY = 1e-3  # the symmetric cases have 1e-10
SLOPE = 2e-2  # of slopes, relative; what bends a gradient changes it by more
_SLOPES = (1e-2, 1e-3, 1e-4)  # lengths of steps
_BENT = (
    "the gradient is not that of the loss: some backward in it passes gradients straight through, "
    "turns them round or stops them; what is measured is the curvature by that backward"
)
_HELD = (
    "part of the loss is held constant for its gradient (detach(), no_grad(), a straight-through "
    "estimator, a weight that forward() changes); what is measured is the curvature with that part "
    "held"
)


class Differentiable(Protocol):
    """What is asked of an Objective."""

    @property
    def layout(self) -> Layout:
        """Where its vectors come from."""

    def gradient(self) -> Tensor:
        """Return g."""

    def gradient_at(self, displacement: Tensor) -> Tensor:
        """Return g at w + displacement."""

    def loss_at(self, displacement: Tensor) -> float:
        """Return L at w + displacement."""

    def hvp(self, v: Tensor) -> Tensor:
        """Return H v."""


Opened: TypeAlias = Callable[[], AbstractContextManager[Differentiable]]


@dataclass(frozen=True, slots=True)
class Validation:
    """What a check of the double-backward HVP against differences of gradients has found."""

    passed: bool | None  # None when it could not be told
    error: float | None = None  # relative
    reason: str = ""
    holds: bool = False  # part of the loss is constant for the gradient: differences see it move


@traceless
def validate(
    objective: Opened, kept: Tensor | None = None, *, held: Opened | None = None
) -> Validation:
    """Compare H v by double backward with differences of gradients, along one random v.

    A backward that is not differentiable (raw tensors kept on ctx, computed without a graph) shows
    here and nowhere else. Where the two differ although the differences agree among themselves,
    double backward is wrong, unless part of the loss is constant for the gradient: then it is the
    Hessian of what is left, and agrees with differences of the loss with that part `held`. What
    nobody can hold (a Function that passes gradients straight through) leaves J, the gradient's
    Jacobian, asymmetric.

    `objective` makes the loss in float64 on a few items, where a step can be so small that it
    crosses no kink of a ReLU; `kept`, (D,), is 0 on parameters that are left out. Costs one HVP and
    two to ten gradients of those few items, as many again where something is held.
    """
    try:
        with objective() as tested:
            comparison = _Comparison(tested, kept)
            found = _judged(comparison)
        if held is None or found.passed is True or comparison.is_too_coarse:
            return found
        with held() as tested:
            error = comparison.against(tested)
            bent = error is None and found.passed is False and slope_error(tested) > SLOPE
    except Exception as failure:  # whatever a loss raises at a precision or size it is not made for
        return Validation(None, reason=f"it could not be run: {type(failure).__name__}: {failure}")
    if bent:
        return Validation(None, found.error, _BENT, holds=True)
    return found if error is None else Validation(True, error, _HELD, holds=True)


def slope_error(objective: Differentiable) -> float:
    """Return how far a loss's slope along its gradient is from the gradient's length, relative.

    0 but for rounding where the gradient is that of the loss. It is not where a backward of the
    user's gives another one: straight through a rounding, reversed, or none at all. Two losses, or
    up to six to find a step that shows it is none.
    """
    gradient = objective.gradient()
    size = float(gradient.norm())
    errors = [0.0] if not size > 0 else []
    for step in _SLOPES if size > 0 else ():
        ahead, behind = (objective.loss_at(h / size * gradient) for h in (step, -step))
        errors.append(abs((ahead - behind) / (2 * step) - size) / size)
        if errors[-1] <= SLOPE:
            break
    return min(errors)


def _judged(found: _Comparison) -> Validation:
    error, resolution = found.error, found.resolution
    if found.agrees(error, resolution):
        return Validation(True, error)
    if found.is_too_coarse:
        reason = f"differences of gradients disagree among themselves by {resolution:.0%}"
        return Validation(None, error, reason)
    if found.asymmetry() > _ASYMMETRY + resolution / error:
        reason = f"{_HELD}; the gradient's Jacobian is not symmetric and has no real spectrum"
        return Validation(None, error, reason, holds=True)
    return Validation(
        False,
        error,
        f"double backward is off by {error:.1%} against differences of gradients: some backward "
        "in the loss is not differentiable, although it does not say so",
    )


class _Comparison:
    """H v by double backward beside J v by differences of gradients at several steps."""

    def __init__(self, objective: Differentiable, kept: Tensor | None) -> None:
        self._gradient_at, self._kept = objective.gradient_at, kept
        v = self._only_kept(objective.layout.normal(generator(0)).to(torch.float64))
        self._v = v / v.norm()
        self._hv = objective.hvp(self._v)
        size = float(self._hv.norm())
        norm = float(objective.gradient().norm())
        self._steps: list[float] = []
        self._differences: list[Tensor] = []
        self._errors: list[float] = []
        for share in _SHARES:
            step = min(share * norm / size, _LARGEST_STEP) if size > 0 else share
            difference = self._difference(self._v, step)
            self._scale = max(float(difference.norm()), size, 1e-12 * norm)
            self._steps.append(step)
            self._differences.append(difference)
            self._errors.append(self._relative(difference - self._hv))
            if self.error <= _CLEAR:
                return

    @property
    def error(self) -> float:
        """||H v - J v|| at the best step, relative to the larger one."""
        return min(self._errors)

    @property
    def resolution(self) -> float:
        """How far two neighbouring differences lie apart, at best."""
        return min(self._spreads(self._differences), default=0.0)

    @property
    def is_too_coarse(self) -> bool:
        """Whether differences can tell nothing."""
        return self.error <= 3 * self.resolution

    @staticmethod
    def agrees(error: float, resolution: float) -> bool:
        """Tell whether an error is none, as far as differences can tell."""
        return error <= min(max(_TOLERANCE, 3 * resolution), _LARGEST_TOLERANCE)

    def against(self, held: Differentiable) -> float | None:
        """Return the error against a loss that holds its first constants; None if it is one."""
        held.gradient()
        self._gradient_at = held.gradient_at
        differences = [self._difference(self._v, step) for step in self._steps]
        error = min(self._relative(difference - self._hv) for difference in differences)
        agrees = self.agrees(error, min(self._spreads(differences), default=0.0))
        return error if agrees else None

    def _spreads(self, differences: Sequence[Tensor]) -> list[float]:
        return [self._relative(b - a) for a, b in pairwise(differences)]

    def asymmetry(self) -> float:
        """(d'J v - v'J d) / d'd for d = J v - H v: 0 where J is symmetric, about 1 where not.

        With H symmetric and B = J - H this is 1 - v'B B v / ||B v||^2.
        """
        best = self._spreads(self._differences).index(self.resolution)
        jv, step = self._differences[best], self._steps[best]
        d = jv - self._hv
        length = d.norm()
        jd = length * self._difference(d / length, step)
        return float((d @ jv - self._v @ jd) / (d @ d))

    def _difference(self, unit: Tensor, step: float) -> Tensor:
        ahead, behind = (self._gradient_at(h * unit) for h in (step, -step))
        return self._only_kept((ahead - behind) / (2 * step))

    def _only_kept(self, vector: Tensor) -> Tensor:
        return vector if self._kept is None else self._kept.to(vector) * vector

    def _relative(self, vector: Tensor) -> float:
        error = float(vector.norm()) / self._scale if self._scale > 0 else 0.0
        return error if math.isfinite(error) else math.inf
