"""Some steps ahead over the last batches, with the real optimizer, put back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geomwatch.curvature.subject import Subject
from geomwatch.errors import WithheldError
from geomwatch.isolation.optimizer import OptimizerAside
from geomwatch.isolation.signals import traceless
from geomwatch.stability.problem import unwrap
from geomwatch.vectors.fsdp import is_sharded

Weigh = Callable[[Subject, Sequence[Any]], list[float] | None]  # micro-batches of a window


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """Goes over windows of batches as training would, at multiples of its rates.

    At each window the gradient of the loss there, at training's own precision, and a step of the
    optimizer; `subject` is the loss, `gain` what a step takes of its gradient: below 1 it is
    clipped to the norm that the present step has, `size`; above, all of them are scaled.

    Weights, optimizer state, rates, gradients, buffers, modes and random generators are put back
    bit for bit, from copies on the host, whatever is raised; schedulers and hooks hear nothing.

    Cost: a gradient and a step each window and multiple, a forward pass for each of the last
    quarter of them, one copy of weights and state on the host.
    """

    subject: Subject
    optimizer: Any
    weigh: Weigh
    gain: float = 1.0
    size: float = math.inf

    def refuse(self) -> None:
        """Refuse what a rehearsal could not put back, or would not be one of.

        Raises:
            WithheldError: it is such a run.
        """
        params, inner = self.subject.layout.params, unwrap(self.optimizer)
        groups = getattr(inner, "param_groups", ())
        if self.subject.ranks.size > 1:
            raise WithheldError("several processes train this model")
        if is_sharded(params):
            raise WithheldError("the model is sharded")
        held = {id(p) for group in groups for p in group["params"] if p.requires_grad}
        if held != {id(p) for p in params}:
            raise WithheldError(
                f"{type(inner).__name__} steps other parameters than those that are measured, as "
                "where a model has several optimizers"
            )

    @traceless
    def rises(self, windows: Sequence[Any], multiples: Sequence[float]) -> list[float]:
        """Return for each multiple by how much the loss of the last quarter of windows rises.

        Mean over them of the loss in the rehearsal, before the step on that window, minus the loss
        at the present weights; infinite where it is not finite.

        Raises:
            WithheldError: see `refuse`, and `OptimizerAside`.
        """
        self.refuse()
        last = windows[-max(1, len(windows) // 4) :]
        before = [self._loss(window) for window in last]
        aside = OptimizerAside(unwrap(self.optimizer))
        found = []
        for multiple in multiples:
            losses = self._losses(aside, windows, multiple)[-len(last) :]
            aside.restore()
            changes = [now - then for now, then in zip(losses, before, strict=True)]
            rise = math.fsum(changes) / len(changes)
            found.append(rise if math.isfinite(rise) else math.inf)
        return found

    @traceless
    def present(self, windows: Sequence[Any]) -> list[float]:
        """Return the losses of windows at the present weights. A forward pass each."""
        return [self._loss(window) for window in windows]

    def _losses(
        self, aside: OptimizerAside, windows: Sequence[Any], multiple: float
    ) -> list[float]:
        """Step through the windows; the losses end in inf where one is not finite."""
        losses: list[float] = []
        used = [p.grad is not None for p in self.subject.layout.params]
        used = used if any(used) else [True] * len(used)  # between two steps
        for window in windows:
            with self._on(window) as objective:
                losses.append(objective.loss())
                gradient = objective.gradient() if math.isfinite(losses[-1]) else None
            if gradient is None:
                return [math.inf] * len(windows)
            self._give(self._taken(gradient), used)
            aside.step(multiple)
        return losses

    def _taken(self, gradient: Tensor) -> Tensor:
        if self.gain > 1:
            return gradient * self.gain
        norm = float(gradient.norm())
        is_clipped = self.gain < 1 and norm > self.size
        return gradient * (self.size / norm) if is_clipped else gradient

    def _give(self, gradient: Tensor, used: Sequence[bool]) -> None:
        layout = self.subject.layout
        pieces = layout.unflatten(gradient)
        for p, piece, is_used in zip(layout.params, pieces, used, strict=True):
            p.grad = piece if is_used else None

    def _loss(self, window: Any) -> float:
        with self._on(window) as objective:
            return float(objective.value())

    def _on(self, window: Any) -> Any:
        subject = self.subject.set(precision="training")
        return subject.on(window, products=False, weights=self.weigh(subject, window))
