"""Batches that a controller may enlarge while a task draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from tasks.sources import Batch, Source
from tasks.training import Loop

from geomwatch.controllers import BatchSizeScaler, Controller, LearningRateCap
from geomwatch.controllers.actuators import BATCH
from harness.watching import Watch

LARGEST = 256  # items


class Knob:
    """How many of the task's own draws make a batch."""

    knob = BATCH
    obstacle = ""

    def __init__(self) -> None:
        self.scale = 1.0

    def set(self, to: float) -> None:
        self.scale = to

    def value(self, rates: Sequence[float]) -> float:
        return self.scale

    def refresh(self) -> None:
        """Do nothing: the next batch is drawn at the next step."""

    def close(self) -> None:
        self.scale = 1.0


@dataclass(frozen=True)
class Growing:
    """A source whose batches are as many draws of another's as the knob says."""

    source: Source
    knob: Knob

    @property
    def full(self) -> int:
        return self.source.full

    def draws(self, seed: int, size: int | None) -> Iterator[Batch]:
        """Yield batches for ever."""
        drawn = self.source.draws(seed, size)
        while True:
            parts = [next(drawn) for _ in range(round(self.knob.scale))]
            inputs, targets = zip(*parts, strict=True)
            yield torch.cat(inputs), torch.cat(targets)

    def train(self, count: int) -> Batch:
        return self.source.train(count)

    def held_out(self) -> Batch:
        return self.source.held_out()


class Batches(Watch):
    """geomwatch's BatchSizeScaler with its defaults, up to 256 items, with the cap or alone."""

    def __init__(self, loop: Loop, *, cap: bool = False) -> None:
        self.knob = Knob()
        loop.task = replace(loop.task, source=Growing(loop.task.source, self.knob))
        controllers: list[Controller] = [BatchSizeScaler(through=self.knob, max_batch=LARGEST)]
        controllers += [LearningRateCap()] if cap else []
        super().__init__(loop, controllers=controllers, observe=False)
