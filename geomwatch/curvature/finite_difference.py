"""Hessian-vector products from differences of gradients, for what has no second derivative."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_AGREEMENT = 2e-3  # of two differences at different steps, relative
_FACTORS = (1.0, 1 / 8, 8.0, 1 / 64)  # of the fitting step, tried in turn
_LARGEST = 0.1
_GUESS = 1e-3  # the first step of one-sided differences
_ATTEMPTS, _FITS, _FAR = 3, 8.0, 1e4  # at a step: how far off it may be, and go at once


class NotSmoothError(RuntimeError):
    """Differences of gradients at two steps do not agree: kinks, or rounding."""


class FiniteDifference:
    """H v = (g(w + h v) - g(w - h v)) / 2h, at two steps that must agree.

    The truncation error grows as h^2 and the rounding error as eps |g| / h, so h is chosen where
    the change of the gradient, h |Hv|, is a fixed share of it: one step can't serve a random
    direction and the gradient's own, whose |Hv| differ by a factor of 1,000. The two differences
    are extrapolated to h = 0 (Richardson). Costs four gradients, or more while it looks for h.
    """

    def __init__(self, gradient_norm: float, dtype: torch.dtype) -> None:
        self._norm = max(gradient_norm, torch.finfo(dtype).tiny)
        # In float64 a step can be so small that it crosses no kink: 1e-6 of the gradient.
        self._share = 1e-2 if dtype == torch.float32 else 1e-6
        self._smallest = 1e-6 if dtype == torch.float32 else 1e-9
        self._eps = torch.finfo(dtype).eps
        self._guess = 1e-2 if dtype == torch.float32 else 1e-6
        self.error = 0.0  # the largest relative disagreement so far

    def __call__(self, gradient_at: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        """Return H v from gradients at displacements of the weights.

        Raises:
            NotSmoothError: no two steps agree to 0.2 %.
        """  # (D,) -> (D,)
        length = float(v.norm())
        if length == 0:
            return torch.zeros_like(v)
        unit = v / length
        base = self._fitting(_difference(gradient_at, unit, self._guess))
        disagreement = float("inf")
        for factor in _FACTORS:
            step = base * factor
            coarse, fine = (_difference(gradient_at, unit, h) for h in (step, step / 2))
            size = float(fine.norm())
            disagreement = float((coarse - fine).norm()) / size if size > 0 else 0.0
            if disagreement <= _AGREEMENT or size <= self._noise(step):
                self._guess = step
                self.error = max(self.error, disagreement)
                return length * (4 * fine - coarse) / 3
        raise NotSmoothError(
            f"differences of gradients at two steps differ by {disagreement:.0%}: the loss has "
            f"kinks (ReLU, max-pooling) or too little precision for them in {v.dtype}"
        )

    def _fitting(self, difference: Tensor) -> float:
        """Return the step at which the gradient changes by its share."""
        size = float(difference.norm())
        wanted = self._share * self._norm / size if size > 0 else self._guess
        return min(max(wanted, self._smallest), _LARGEST)

    def _noise(self, step: float) -> float:
        """Return the size of a difference that is all rounding."""
        return 10 * self._eps * self._norm / step


class OneSided:
    """H v = (g(w + h v) - g(w)) / h, from the gradient that is known: one gradient a product.

    The truncation error grows as h and the rounding error as eps |g| / h, so that h is chosen where
    the gradient changes by a share of its length: 1e-3 in float32, where on smooth nets (attention,
    LSTM, GELU, SiLU, tanh) top eigenvalues are those of double backward to .1 %; with ReLU they are
    off by 1,000 % and more, since each kink that is crossed adds its own jump (see `smoothness`).
    """

    def __init__(self, gradient: Tensor, bends: dict[str, float]) -> None:
        self._gradient = gradient
        self._share = 1e-3 if gradient.dtype == torch.float32 else 1e-5
        tiny = torch.finfo(gradient.dtype).tiny
        self._norm = max(float(gradient.norm()), tiny)
        self._bends = bends  # |H u| of the last unit vector of a kind

    def __call__(
        self, gradient_at: Callable[[Tensor], Tensor], v: Tensor, like: str = "top"
    ) -> Tensor:
        """Return H v. One gradient, two where the step has to be found first.

        `like` names directions of like curvature: the next step is the last one of its kind.
        """  # (D,) -> (D,)
        length = float(v.norm())
        if length == 0:
            return torch.zeros_like(v)
        unit = v / length
        step = self.step(like)
        for attempt in range(_ATTEMPTS):
            bent = self.difference(gradient_at, unit, step)
            moved = float(bent.norm()) / self._norm
            fits = self._share / _FITS < moved < self._share * _FITS
            if fits or attempt == _ATTEMPTS - 1 or not 0 < moved < math.inf:
                break
            step = min(max(step * self._share / moved, step / _FAR), step * _FAR)
        self._bends[like] = max(float(bent.norm()) / step, torch.finfo(v.dtype).tiny)
        return bent.mul_(length / step)

    def step(self, like: str) -> float:
        """Return the step along a unit vector that fits as far as is known."""
        bend = self._bends.get(like)
        return _GUESS if bend is None else self._share * self._norm / bend

    def difference(
        self, gradient_at: Callable[[Tensor], Tensor], unit: Tensor, step: float
    ) -> Tensor:
        """Return g(w + step unit) - g(w)."""
        return gradient_at(step * unit).sub_(self._gradient)


def _difference(gradient_at: Callable[[Tensor], Tensor], unit: Tensor, step: float) -> Tensor:
    ahead, behind = gradient_at(step * unit), gradient_at(-step * unit)
    return (ahead - behind) / (2 * step)
