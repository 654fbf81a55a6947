"""The loss of a host's micro-batches, evaluated again: as trained on, whole or in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn

from geomwatch.curvature.batches import Carrier
from geomwatch.curvature.cutting import Cutter
from geomwatch.curvature.objective import LossFn
from geomwatch.errors import WithheldError


@dataclass(frozen=True, slots=True)
class MicroBatch(Carrier):
    """A micro-batch, whole or a piece of it that knows what it is a piece of."""

    batch: Any
    whole: float  # what the whole of it weighs
    # What the host has trained on it by, to be done again: `random` is the random state before it,
    # None if that is not kept.
    call: Any = None
    part: float = 1.0  # of the items of the whole

    def carried(self) -> Any:
        """Return the batch."""
        return self.batch

    def carrying(self, batch: Any, share: float) -> MicroBatch:
        """Return a share of the batch, to be evaluated by the same call."""
        return replace(self, batch=batch, part=self.part * share)


class Unknown:
    """A micro-batch that fails the probe on all ranks: without it they would measure another loss.

    A process alone has no need of it: it observes nothing, and nothing is measured.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    def evaluate(self) -> NoReturn:
        """Tell why there is no loss of it.

        Raises:
            WithheldError: always.
        """
        raise WithheldError(self._why)


class HostLoss:
    """loss_fn(model, batch) on the micro-batches of a host, which count alike whatever their size.

    Hosts divide each loss by the number of micro-batches, so that the mean over a window is not the
    mean over its items. A piece of a micro-batch (`micro_batch=`) counts by its share of what the
    whole weighs: of its items, or of what `weigh` says. A whole one that training has evaluated is
    evaluated from the same random state, hence with the same dropout masks.
    """

    # Without a __dict__ there is nothing in here that a probe would have to watch.
    __slots__ = ("given", "weigh")

    def __init__(self, given: LossFn | None, weigh: Callable[[Any], float] | None = None) -> None:
        self.given = given  # a function of the user's, in place of what the host computes
        self.weigh = weigh  # None: by items

    def micro_batch(self, batch: Any, call: Any = None) -> MicroBatch:
        """Return a batch as this loss knows it."""
        return MicroBatch(batch, self.weight_of(batch), call)

    def weight(self, batch: Any) -> float:
        """Return what a batch counts for in the mean over a window, and over ranks."""
        if isinstance(batch, Unknown):
            return 1.0
        return self.share(batch) if isinstance(batch, MicroBatch) else self.weight_of(batch)

    def weight_of(self, batch: Any) -> float:
        """Return what a plain batch weighs."""
        return float(Cutter().count(batch) if self.weigh is None else self.weigh(batch))

    def share(self, micro: MicroBatch) -> float:
        """Return how much of the whole this is: 1, or less for a piece."""
        if not micro.whole > 0:
            return 0.0
        return micro.part if self.weigh is None else self.weight_of(micro.batch) / micro.whole

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a micro-batch, of a piece of one, or of a batch of the user's."""
        if isinstance(batch, Unknown):
            batch.evaluate()
        if not isinstance(batch, MicroBatch):
            return self.evaluate(model, batch, None, 1.0)
        call, share = batch.call, self.share(batch)
        if call is not None and call.random is not None and share == 1:
            call.random.restore()
        return self.evaluate(model, batch.batch, call, share)

    def evaluate(self, model: nn.Module, batch: Any, call: Any, share: float) -> Tensor:
        """Return the loss as the host computes it; `call` was for a batch of which it is a share.

        Hosts override it.
        """
        raise NotImplementedError

    def isolates(self) -> list[object]:
        """Return what evaluating the loss may change beside the model."""
        return []


def mean_of(losses: Sequence[Tensor | float | None]) -> Tensor | float | None:
    """Return the loss of a window that hosts step on, unless one of its micro-batches has none."""
    known = [loss for loss in losses if loss is not None]
    return sum(known[1:], known[0]) / len(known) if known and len(known) == len(losses) else None
