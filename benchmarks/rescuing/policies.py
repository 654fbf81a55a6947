"""What may keep a run from diverging: geomwatch's cap, and what people use instead."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from tasks.sources import Batch
from tasks.training import Loop
from torch import Tensor

import geomwatch
from geomwatch.controllers import LearningRateCap

EPOCH = 25  # steps that a plateau scheduler calls an epoch


class Policy(Protocol):
    """Looks at a step before it is taken; may change gradients, or the rate of the step."""

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Act on the gradients that are there."""

    def facts(self) -> dict[str, Any]:
        """Return what is worth keeping of it."""


class Nothing:
    """No control."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Do nothing."""

    def facts(self) -> dict[str, Any]:
        return {}

    def norm(self) -> float:
        return float(torch.nn.utils.get_total_norm(self._gradients()))

    def clip(self, norm: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.loop.model.parameters(), norm)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.loop.model.parameters() if p.grad is not None]


class Cap(Nothing):
    """geomwatch's LearningRateCap, with the defaults of controller and monitor."""

    monitoring: ClassVar[dict[str, Any]] = {}

    def __init__(self, loop: Loop, **options: Any) -> None:
        super().__init__(loop)
        self.monitor = geomwatch.Monitor(
            loop.model,
            loop.task.loss_fn,
            loop.optimizer,
            controllers=[LearningRateCap(**options)],
            **self.monitoring,
        )
        self.users, self.taken = [0.0], [0.0]  # rates
        loop.optimizer.register_step_pre_hook(lambda *_: self.taken.append(self._rate()))

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Let the monitor look at the step."""
        self.monitor.step(batch, loss=loss)
        self.users.append(self._rate())

    def facts(self) -> dict[str, Any]:
        return {
            "scales": [
                round(taken / user, 5) if user else 1.0
                for user, taken in zip(self.users[1:], self.taken[1:], strict=False)
            ],
            "probes": len(self.monitor.history),
            "probe_seconds": self.monitor.probe_seconds,
            "adjustments": len(self.monitor.adjustments),
        }

    def _rate(self) -> float:
        return float(self.loop.optimizer.param_groups[0]["lr"])


class Lean(Cap):
    """The cap on sentinels, with hardly anything else measured."""

    monitoring: ClassVar[dict[str, Any]] = {"quantities": ["loss"], "max_overhead": 0.05}


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


POLICIES: dict[str, Callable[[Loop], Policy]] = {
    "none": Nothing,
    "cap": Cap,
    "lean": Lean,
    "clip": Clip,
    "autoclip": AutoClip,
    "zclip": ZClip,
    "plateau": Plateau,
}
BASELINES = ("clip", "autoclip", "zclip", "plateau")
NAMES = {
    "none": "no control",
    "cap": "**LearningRateCap**",
    "lean": "the same, lean",
    "clip": "clip 1.0",
    "autoclip": "AutoClip",
    "zclip": "ZClip",
    "plateau": "ReduceLROnPlateau",
    "tuned": "tuned warm-up and rate",
}


def make(name: str, loop: Loop) -> Policy:
    """Return a policy by name; "cap:c_bs=1.5,release=1.1" sets options of the cap."""
    kind, _, given = name.partition(":")
    if not given:
        return POLICIES[kind](loop)
    options = dict(part.split("=") for part in given.split(","))
    return Cap(loop, **{key: float(value) for key, value in options.items()})
