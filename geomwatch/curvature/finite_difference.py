"""Hessian-vector products from differences of gradients, for what has no second derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_AGREEMENT = 2e-3  # of two differences at different steps, relative
_FACTORS = (1.0, 1 / 8, 8.0, 1 / 64)  # of the fitting step, tried in turn
_LARGEST = 0.1


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


def _difference(gradient_at: Callable[[Tensor], Tensor], unit: Tensor, step: float) -> Tensor:
    ahead, behind = gradient_at(step * unit), gradient_at(-step * unit)
    return (ahead - behind) / (2 * step)
