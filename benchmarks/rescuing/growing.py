"""Batches that a controller may enlarge while a task draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tasks.sources import Batch, Source
from tasks.training import Loop

import geomwatch
from geomwatch.controllers import BatchSizeScaler, Controller, LearningRateCap
from geomwatch.controllers.actuators import BATCH
from rescuing.policies import Nothing

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


class Batches(Nothing):
    """geomwatch's BatchSizeScaler with its defaults, up to 256 items, with the cap or alone."""

    def __init__(self, loop: Loop, *, cap: bool) -> None:
        super().__init__(loop)
        self.knob = Knob()
        loop.task = replace(loop.task, source=Growing(loop.task.source, self.knob))
        controllers: list[Controller] = [BatchSizeScaler(through=self.knob, max_batch=LARGEST)]
        controllers += [LearningRateCap()] if cap else []
        self.monitor = geomwatch.Monitor(
            loop.model, loop.task.loss_fn, loop.optimizer, controllers=controllers
        )

    def __call__(self, step: int, batch: Batch, loss: torch.Tensor) -> None:
        """Let the monitor look at the step."""
        self.monitor.step(batch, loss=loss)

    def facts(self) -> dict[str, Any]:
        moves = [(a.step, a.after) for a in self.monitor.adjustments if a.knob == BATCH]
        return {"moves": moves, "scale": self.knob.scale, "probes": len(self.monitor.history)}
