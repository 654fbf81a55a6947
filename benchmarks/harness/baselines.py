"""What people use against rates that are too high: clipping, lower rates, a warm-up."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from tasks.schedules import START, WARM_UP
from tasks.sources import Batch
from tasks.training import Loop
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from harness.policy import Nothing

EPOCH = 25  # steps that a plateau scheduler calls an epoch


class Clip(Nothing):
    """Gradients clipped at norm 1."""

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        self.clip(1.0)


class AutoClip(Nothing):
    """Clipped at the 10th percentile of all norms so far (Seetharaman et al. 2020)."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self.norms: list[float] = []

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        norm = self.norm()
        if math.isfinite(norm):
            self.norms.append(norm)
            self.clip(float(torch.tensor(self.norms).quantile(0.1)))


class ZClip(Nothing):
    """Norms above 2.5 standard deviations go to mu + 2.5^2 sigma / z (Kumar et al. 2025)."""

    DECAY, Z, WARM_UP = 0.97, 2.5, 25

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        norm = self.norm()
        if not math.isfinite(norm):
            return
        if len(self.first) < self.WARM_UP:
            self.first.append(norm)
            self.mean = statistics.fmean(self.first)
            self.variance = statistics.pvariance(self.first)
            return
        sd = math.sqrt(self.variance)
        score = (norm - self.mean) / (sd + 1e-6)
        if score > self.Z:
            norm = self.mean + self.Z**2 * sd / score
            self.clip(norm)
        self.mean = self.DECAY * self.mean + (1 - self.DECAY) * norm
        self.variance = self.DECAY * self.variance + (1 - self.DECAY) * (norm - self.mean) ** 2


class Plateau(Nothing):
    """torch's ReduceLROnPlateau (factor 0.1, patience 10) on the mean loss of 25 steps."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        self.factor = dummy.param_groups[0]
        # patience in epochs of 25 steps; the default of 10 would be most of a run
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(dummy, patience=3)
        self.losses: list[float] = []
        self.base: list[float] = []
        loop.optimizer.register_step_pre_hook(self._lower)
        loop.optimizer.register_step_post_hook(self._restore)

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        self.losses.append(float(loss))
        if len(self.losses) == EPOCH:
            self.scheduler.step(statistics.fmean(self.losses))
            self.losses = []

    def _lower(self, optimizer: Any, *_: object) -> None:
        self.base = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= self.factor["lr"]

    def _restore(self, optimizer: Any, *_: object) -> None:
        for group, rate in zip(optimizer.param_groups, self.base, strict=True):
            group["lr"] = rate


class WarmUp(Nothing):
    """A warm-up in front of a schedule that has none; its rate is chosen with it."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop)
        courses = {"constant": _warm, "cosine": _warm_cosine}
        if course := courses.get(loop.recipe.schedule):
            for group in loop.optimizer.param_groups:
                group["lr"] = loop.recipe.rate
            steps = loop.recipe.steps
            loop.scheduler = LambdaLR(loop.optimizer, lambda t: course(t / steps))


def _warm(done: float) -> float:
    return min(START + (1 - START) * done / WARM_UP, 1.0)


def _warm_cosine(done: float) -> float:
    if done < WARM_UP:
        return _warm(done)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
