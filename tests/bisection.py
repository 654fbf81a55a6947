"""The rate at which an optimizer's own steps on a quadratic begin to grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomwatch.stability.problem import stability_of
from geomwatch.vectors.layout import Layout

_START = 1e-9  # of the weight, so that nothing that is held has a gradient to go by
_STEPS, _WINDOW = 300, 50


def _nothing(optimizer: Any, w: Tensor) -> None:
    """Nothing is held still."""


@dataclass(frozen=True)
class Quadratic:
    """curvature / 2 w^2 under an optimizer, whose preconditioner and counters are put back."""

    make: Callable[[list[Tensor], float], Any]
    hold: Callable[[Any, Tensor], None] = _nothing
    curvature: float = 3.0
    sparse: bool = False

    def begin(self, lr: float) -> tuple[Tensor, Any]:
        """Return one weight and its optimizer, whose state exists."""
        w = torch.full((1, 1) if self.sparse else (1,), _START, dtype=torch.float64)
        w.requires_grad_()
        optimizer = self.make([w], lr)
        w.grad = self._sparse(0 * w.detach())
        optimizer.step()
        with torch.no_grad():
            w.fill_(_START)
        return w, optimizer

    def ready(self, optimizer: Any, w: Tensor) -> None:
        """Go to just before a step."""
        self.hold(optimizer, w)
        w.grad = self._sparse(self.curvature * w.detach())

    def grows(self, lr: float) -> bool:
        """Tell whether steps grow, late enough for one mode to be left."""
        w, optimizer = self.begin(lr)
        peaks = [0.0] * (_STEPS // _WINDOW)
        for step in range(_STEPS):
            self.ready(optimizer, w)
            optimizer.step()
            size = abs(w.item())
            if not size <= 1e4 * _START:
                return True
            peaks[step // _WINDOW] = max(peaks[step // _WINDOW], size)
        return peaks[-1] > peaks[-2]

    def limit(self) -> float:
        """Return the rate at which geomwatch has the margin at 1."""
        lr = 0.1
        for _ in range(20):
            margin, status = self.margin(lr)
            assert status == "ok", status
            lr /= margin
        return lr

    def error(self, share: float = 0.01) -> str:
        """Say on which side of that rate, by a share of it, steps are not as they should be."""
        limit = self.limit()
        below, above = self.grows((1 - share) * limit), self.grows((1 + share) * limit)
        return "" if above and not below else f"at {limit:g}: grows below {below}, above {above}"

    def margin(self, lr: float) -> tuple[float, str]:
        """Return what geomwatch has for the margin of a step at this rate, and its status."""
        w, optimizer = self.begin(lr)
        self.ready(optimizer, w)
        gradient = w.grad.to_dense().reshape(-1)
        problem = stability_of(
            optimizer, Layout(("w",), (w,)), gradient=gradient, damping="none", cold_start=True
        )
        along = problem.apply(lambda v: self.curvature * v)(torch.ones_like(problem.scale))
        return along.item(), problem.status

    def _sparse(self, gradient: Tensor) -> Tensor:
        return gradient.to_sparse(1) if self.sparse else gradient


def held(state: dict[str, float], **group: Any) -> Callable[[Any, Tensor], None]:
    """Return what puts tensors of the state, and options of the group, back to these values."""

    def hold(optimizer: Any, w: Tensor) -> None:
        optimizer.param_groups[0].update(group)
        own = optimizer.state[w]
        for key, value in state.items():
            if isinstance(own[key], Tensor):
                own[key].fill_(value)
            else:
                own[key] = value

    return hold
