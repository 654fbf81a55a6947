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
_PARALLEL = 0.99  # cosine of gradients of the same loss; another dropout mask gives .3 to .95
_OTHER_MASK = 2.0  # by what factor norms under two masks may differ


class ReplayFidelity(Resumable):
    """Remembers whether steps use the very gradient and loss that replays of their batches have.

    They do not under dropout (another mask), after clipping, with autocast or a fixed probe batch.

    `gain` is what the step takes of the loss's gradient g: the projection <g', g> / <g, g> of its
    own g'. Below 1 it was clipped; above, the loss was scaled, or an accumulation not divided. As
    linear dynamics go, a step on gain x g has gain x the margin of one on g. Where g' and g point
    in other directions (dropout, other ranks) it is known from norms alone: from that before
    clipping, where somebody has told it.
    """

    has_gradient: Kept[bool]
    has_loss: Kept[bool]
    agrees: Kept[bool]
    gain: Kept[float]

    def __init__(self) -> None:
        self.has_gradient = False  # of the replay, to rounding
        self.has_loss = False
        self.agrees = False  # in direction
        self.gain = 1.0
        self._checked = False  # that gradients are not those of a scaled loss

    def compare(self, objective: Objective, gradient: Tensor | None, loss: float | None) -> None:
        """Look at one step; `gradient` None where it is of other data than `objective`."""
        own = objective.gradient()
        size = float(own.norm())
        self.has_gradient = (
            gradient is not None and float((gradient - own).norm()) <= _SAME_GRADIENT * size
        )
        self.agrees, self.gain = self.has_gradient, 1.0
        if gradient is not None and not self.has_gradient and size > 0:
            self._note_gain(float(gradient.norm()), float(gradient @ own) / size, size)
        same = loss is not None and math.isclose(loss, objective.loss(), rel_tol=_SAME_LOSS)
        self.has_loss = self.has_gradient and same and objective.ranks.size == 1

    def _note_gain(self, taken: float, along: float, size: float) -> None:
        self.agrees = along > _PARALLEL * taken
        if self.agrees:
            self.gain = along / size
        elif not 1 / _OTHER_MASK < taken / size < _OTHER_MASK:
            self.gain = taken / size

    def gain_of_step(self, gradient: Tensor | None, unclipped: float | None) -> float:
        """Return the gain of this step; `unclipped` is the norm of its gradient before clipping."""
        if gradient is None or not unclipped or not math.isfinite(unclipped):
            return self.gain
        clipped = float(gradient.norm()) / unclipped
        # what else there is of a gain, such as an accumulation that is not divided, comes beside
        return clipped * max(self.gain, 1.0) if clipped < 1 - _SAME_GRADIENT else self.gain

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
