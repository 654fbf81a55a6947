"""Batches whose size can change while a loop draws them, and a loop's own accumulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, Sampler

from geomwatch.controllers.actuators import BATCH, Actuator
from geomwatch.errors import UsageTypeError
from geomwatch.observation.documented import whole

T = TypeVar("T")


class ResizableBatchSampler(BatchSampler):
    """A torch BatchSampler whose `batch_size` may be set between two batches.

    `DataLoader(data, batch_sampler=ResizableBatchSampler(RandomSampler(data), 64))`. A new size
    holds from the next batch that is drawn on; workers have drawn `num_workers * prefetch_factor`
    batches ahead by then. Lightning and accelerate shard it as they do any BatchSampler. `len` is
    that of an epoch at the present size.
    """

    def __init__(
        self, sampler: Sampler[int] | Iterable[int], batch_size: int, drop_last: bool = False
    ) -> None:
        whole(1)("batch_size", batch_size)
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Draw one epoch."""
        drawn = iter(self.sampler)
        while batch := list(itertools.islice(drawn, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


class SampledBatches(Actuator):
    """Turns the batch size of a ResizableBatchSampler, wherever a host has wrapped it.

    Args:
        source: the sampler, a sampler around it, or the DataLoader that draws from it.

    Raises:
        UsageTypeError: there is no ResizableBatchSampler inside.
    """

    def __init__(self, source: Any) -> None:
        super().__init__(BATCH)
        self._chain = samplers_of(source)
        if not self._chain:
            raise UsageTypeError(
                "sampler must be a ResizableBatchSampler or a DataLoader that draws from one, got "
                f"{type(source).__name__}. Build the loader with DataLoader(data, "
                "batch_sampler=ResizableBatchSampler(sampler, batch_size))."
            )
        self._base = int(self._chain[-1].batch_size)

    def set(self, to: float) -> None:
        """Draw batches of `to` times the size from the next one on."""
        super().set(to)
        for sampler in self._chain:  # a shard remembers the size of what it cuts
            sampler.batch_size = round(to * self._base)

    def close(self) -> None:
        """Draw batches of the first size again."""
        self.set(1.0)


class Windows(Actuator):
    """Gradient accumulation, in windows of some batches that a controller may make longer.

    A window that changed its length while it is filled would be stepped with too early, or never be
    zeroed: so `set` only says how long the next ones should be.
    """

    def __init__(self, batches: int) -> None:
        super().__init__(BATCH)
        self._base = batches

    @property
    def wanted(self) -> int:
        """The batches that a window should have by now."""
        return round(self.setting * self._base)

    def close(self) -> None:
        """Go back to windows of the first length."""
        self.set(1.0)


class Accumulation(Windows):
    """Gradient accumulation of a plain loop, in windows that a controller may widen.

        accumulation = Accumulation()
        for window in accumulation.windows(loader):
            for batch in window:
                (loss_fn(model, batch) / len(window)).backward()
                monitor.observe(batch)
            monitor.step()
            optimizer.step()
            optimizer.zero_grad()

    with `BatchSizeScaler(through=accumulation)`. A window is as long as its first batch finds it.
    """

    def __init__(self, batches: int = 1) -> None:
        whole(1)("batches", batches)
        super().__init__(batches)

    def windows(self, loader: Iterable[T]) -> Iterator[list[T]]:
        """Cut the batches of a loader into windows of one optimizer step each."""
        drawn = iter(loader)
        while window := list(itertools.islice(drawn, self.wanted)):
            yield window


def samplers_of(source: Any) -> list[Any]:
    """Return the samplers from a loader or wrapper down to a ResizableBatchSampler; else none."""
    chain: list[Any] = []
    part = source
    while part is not None and all(part is not seen for seen in chain):
        if isinstance(part, ResizableBatchSampler):
            return [*(s for s in chain if isinstance(s, BatchSampler)), part]
        chain.append(part)
        part = getattr(part, "batch_sampler", None) or getattr(part, "base_dataloader", None)
    return []
