"""The loss of an accumulation window as accelerate trains on it: each micro-batch counts alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from geomwatch.curvature import batches
from geomwatch.curvature.objective import LossFn


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch, whole or a piece of one, that knows what the whole weighs."""

    batch: Any
    whole: float


class EachAlike:
    """loss_fn on micro-batches that count alike, whatever their size.

    `accelerator.backward` divides each loss by the number of micro-batches, so a last one that is
    shorter counts as much as the others: the mean over a window is not the mean over its items. A
    piece of a micro-batch (`micro_batch=`) counts by its share of the items, or of what
    `loss_fn.weight(batch)` says.
    """

    # Without a __dict__ there is nothing in here that a probe would have to watch.
    __slots__ = ("_loss_fn", "_weigh")

    def __init__(self, loss_fn: LossFn) -> None:
        self._loss_fn = loss_fn
        weigh = getattr(loss_fn, "weight", None)  # of a loss module it may be a tensor
        self._weigh: Callable[[Any], float] = weigh if callable(weigh) else batches.items

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Return the loss of a micro-batch, or of the monitor's own probe_batch."""
        return self._loss_fn(model, batch.batch if isinstance(batch, MicroBatch) else batch)

    def weight(self, batch: Any) -> float:
        """Return 1 for a micro-batch, its share for a piece of one."""
        if not isinstance(batch, MicroBatch):
            return float(self._weigh(batch))
        return float(self._weigh(batch.batch)) / batch.whole if batch.whole > 0 else 0.0

    def micro_batch(self, batch: Any) -> MicroBatch:
        """Return a batch as this loss knows it."""
        return MicroBatch(batch, float(self._weigh(batch)))
