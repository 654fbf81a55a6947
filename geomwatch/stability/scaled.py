"""The Hessian in the coordinates of a step: where its largest eigenvalue is the margin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from geomwatch.stability.recursion import Recursion


@dataclass(frozen=True, slots=True, eq=False)
class Stability:
    """The stability problem of one coming step, per coordinate. The margin M has no unit.

    The small-batch margin looks along d = S^2 g, the preconditioned gradient, and costs one HVP:
    limit_ratio * d'(sign H + W)d / g'S^2 g. That is eta BS / 2 for SGD, eta BS / (2(1-mu)) with
    momentum, eta BS_P / 2 for Adam, BS_P = g'P^-1 H P^-1 g / g'P^-1 g (Andreyev et al. 2026).
    """

    scale: Tensor  # (D,) S; 0 on coordinates that are excluded or that the step leaves alone
    inverse_preconditioner: Tensor  # (D,) P^-1, 1 for SGD; 0 where excluded or left alone
    decay: Tensor | None  # (D,) W, coupled weight decay; None when all zero
    uniform: float | None  # c if S = c I, so that lambda_max(sign H + W) = M / c^2; else None
    recursions: tuple[Recursion, ...]  # of the groups, in the coordinates that S scales
    sign: float = 1.0  # -1.0 when the optimizer maximizes
    status: str = "ok"  # "ok" | "unknown" | "directional"
    reason: str = ""  # why it is not "ok"

    @property
    def limit_ratio(self) -> float:
        """Deterministic over small-batch threshold, the largest of the groups."""
        return max((r.limit_ratio for r in self.recursions), default=1.0)

    def step_along(self, gradient: Tensor) -> Tensor:
        """Return d = S^2 g: the coming step but for its length and its past. One pass over D."""
        if self.uniform is not None:
            return self.uniform**2 * gradient
        return (self.scale * gradient).mul_(self.scale)

    def apply(self, hvp: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return y -> S (sign H + W) S y, (D,) -> (D,), for hvp(v) = H v. One HVP a call."""

        def scaled(y: Tensor) -> Tensor:
            v = self.scale * y
            image = hvp(v) if self.sign > 0 else -hvp(v)
            if self.decay is not None:
                image = image + self.decay * v
            return self.scale * image

        return scaled
