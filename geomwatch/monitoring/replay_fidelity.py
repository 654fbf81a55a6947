"""What the coming step itself knows, beside what a replay of its batch gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from geomwatch.curvature.objective import Objective
from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.vectors.layout import Layout

_SAME_GRADIENT = 1e-4  # relative
_SAME_LOSS = 1e-6


class ReplayFidelity(Resumable):
    """Remembers whether steps use the very gradient and loss that replays of their batches have.

    They do not under dropout (another mask), after clipping, with autocast or a fixed probe batch.
    """

    has_gradient: Kept[bool]
    has_loss: Kept[bool]

    def __init__(self) -> None:
        self.has_gradient = False  # of the replay, to rounding
        self.has_loss = False
        self._checked = False  # that gradients are not those of a scaled loss

    def compare(self, objective: Objective, gradient: Tensor | None, loss: float | None) -> None:
        """Look at one step; `gradient` None where it is of other data than `objective`."""
        own = objective.gradient()
        size = float(own.norm())
        self.has_gradient = (
            gradient is not None and float((gradient - own).norm()) <= _SAME_GRADIENT * size
        )
        same = loss is not None and math.isclose(loss, objective.loss(), rel_tol=_SAME_LOSS)
        self.has_loss = self.has_gradient and same and objective.ranks.size == 1

    def refuse_scaled(self, gradient: Tensor, own: Tensor) -> None:
        """Refuse, at the first step, the gradient of a scaled loss.

        It is parallel to the probe's and 2^k times as long.

        Raises:
            UsageError: it is such a gradient.
        """
        if self._checked:
            return
        self._checked = True
        ratio = float(gradient.norm() / own.norm()) if float(own.norm()) > 0 else 0.0
        if not math.isfinite(ratio) or ratio < 64:
            return
        cosine = float(gradient @ own / (gradient.norm() * own.norm()))
        power = round(math.log2(ratio))
        if cosine > 0.9 and abs(ratio / 2.0**power - 1) < 0.2:
            self._checked = False
            raise UsageError(
                f"gradients must be unscaled before monitor.step(), got gradients 2^{power} times "
                "the loss's own. Call scaler.unscale_(optimizer) first, then clip, then "
                "monitor.step(); or pass grad_scale=scaler.get_scale()."
            )


def gradient_of_step(layout: Layout, scale: float) -> Tensor | None:
    """Return the gradient that the step will use, divided by `scale`; None if there is none."""
    gradients: Sequence[Tensor | None] = [p.grad for p in layout.params]
    if all(g is None for g in gradients):
        return None
    filled = [
        torch.zeros_like(p) if g is None else g
        for p, g in zip(layout.params, gradients, strict=True)
    ]
    return layout.flatten(filled).div_(scale)
