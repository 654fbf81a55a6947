"""Batches whose size can change while a loop draws them, and a loop's own accumulation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch.utils.data import BatchSampler, Sampler

from geomwatch.controllers.actuators import BATCH
from geomwatch.curvature.checks import check_count
from geomwatch.errors import UsageTypeError

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
        check_count("batch_size", batch_size, 1)
        super().__init__(sampler, batch_size, drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """Draw one epoch."""
        drawn = iter(self.sampler)
        while batch := list(itertools.islice(drawn, self.batch_size)):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


class SampledBatches:
    """Turns the batch size of a ResizableBatchSampler, wherever a host has wrapped it.

    Args:
        source: the sampler, a sampler around it, or the DataLoader that draws from it.

    Raises:
        UsageTypeError: there is no ResizableBatchSampler inside.
    """

    knob = BATCH
    obstacle = ""

    def __init__(self, source: Any) -> None:
        self._chain = samplers_of(source)
        if not self._chain:
            raise UsageTypeError(
                "sampler must be a ResizableBatchSampler or a DataLoader that draws from one, got "
                f"{type(source).__name__}. Build the loader with DataLoader(data, "
                "batch_sampler=ResizableBatchSampler(sampler, batch_size))."
            )
        self._base = int(self._chain[-1].batch_size)
        self._scale = 1.0

    def set(self, to: float) -> None:
        """Draw batches of `to` times the size from the next one on."""
        self._scale = to
        for sampler in self._chain:  # a shard remembers the size of what it cuts
            sampler.batch_size = round(to * self._base)

    def value(self, rates: Sequence[float]) -> float:
        """Return the multiple of the batch size."""
        return self._scale

    def refresh(self) -> None:
        """Do nothing: a sampler takes its size up when it draws."""

    def close(self) -> None:
        """Draw batches of the first size again."""
        self.set(1.0)


class Accumulation:
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

    knob = BATCH
    obstacle = ""

    def __init__(self, batches: int = 1) -> None:
        check_count("batches", batches, 1)
        self._base = batches
        self._scale = 1.0

    def windows(self, loader: Iterable[T]) -> Iterator[list[T]]:
        """Cut the batches of a loader into windows of one optimizer step each."""
        drawn = iter(loader)
        while window := list(itertools.islice(drawn, round(self._base * self._scale))):
            yield window

    def set(self, to: float) -> None:
        """Make windows `to` times as long, from the next one on."""
        self._scale = to

    def value(self, rates: Sequence[float]) -> float:
        """Return the multiple of the window."""
        return self._scale

    def refresh(self) -> None:
        """Do nothing: the next window is cut when it begins."""

    def close(self) -> None:
        """Go back to windows of the first length."""
        self._scale = 1.0


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
