"""One parameter's coming step: what a formula may look at, and what it returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomwatch.stability.recursion import Recursion
from geomwatch.vectors.layout import entries


@dataclass(frozen=True, slots=True)
class Coming:
    """What a formula may look at: one parameter just before its step."""

    group: Mapping[str, Any]
    state: Mapping[str, Any]
    lr: float
    gradient: Tensor  # (n,), as the optimizer will use it: sign flipped, coupled decay added
    count: float  # t, this step's number, from 1
    sign: float  # -1 if it maximizes
    decay: float  # coupled weight decay
    keep: float  # what decoupled weight decay leaves of the weights, 1 - lr wd
    cold_start: bool  # keep what makes the first steps longer than later ones
    weights: Tensor  # (n,)
    shape: torch.Size

    def option(self, name: str, default: float = 0.0) -> float:
        """Return a number of the group; the default where it has none."""
        value = self.group.get(name)
        return default if value is None else float(value)

    def has(self, key: str) -> bool:
        """Tell whether the state has a tensor of this name."""
        return self.state.get(key) is not None

    def read(self, key: str) -> Tensor:
        """Return a state tensor as a vector like the gradient; zeros before the first step."""
        value = self.state.get(key)
        return torch.zeros_like(self.gradient) if value is None else entries(self.gradient, value)

    def average_of_squares(self, key: str, decay: float) -> Tensor:
        """Return a running average of squares as the coming step will have it."""
        moment = decay * self.read(key)
        return moment.addcmul_(self.gradient, self.gradient, value=1 - decay)

    def start(self, decay: float) -> float:
        """Return the share of its settled size that an average from zero has, 1 - decay^t."""
        return 1 - decay**self.count if decay < 1 else 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One parameter's coming step: the recursion that each eigenvalue of P^-1 H goes through."""

    recursion: Recursion
    preconditioner: Tensor | None = None  # (n,) P; None for 1
    moment: Tensor | None = None  # (n,) what P is made of: > 0 where a gradient was seen
    decay: float = 0.0  # coupled weight decay
    buffer: Tensor | None = None  # (n,) m before the step, as the recursion has it; None for 0
    slow_buffer: Tensor | None = None  # (n,) the same of the slow average
    decay_after: float = 0.0  # weight decay that is added to P^-1 g

    def update(self, c: Coming) -> Tensor:
        """Return w' - w as this step will have it.

        w' = keep w - rate [P^-1 (direct g + through m' + slow m_slow') + decay_after w].
        """  # (n,)
        r, g = self.recursion, c.gradient
        along = r.direct * g
        if r.through:
            along = along + r.through * _advanced(self.buffer, r.memory, r.intake * g)
        if r.slow:
            slow = _advanced(self.slow_buffer, r.slow_memory, (1 - r.slow_memory) * g)
            along = along + r.slow * slow
        if self.preconditioner is not None:
            along = along / self.preconditioner
        if self.decay_after:
            along = along + self.decay_after * c.weights
        return (r.keep - 1) * c.weights - r.rate * along


def averaging(
    c: Coming,
    p: Tensor,
    moment: Tensor | None,
    *,
    direct: float = 0.0,
    through: float,
    rate: float | None = None,
    buffer: Tensor | None = None,
) -> Step:
    """Return a step along the gradient and its running average m = b1 m + (1-b1) g.

    P takes up what makes them sum to another weight than 1: Adam's (1-b1^t) at a cold start.
    """
    b1, total = float(c.group["betas"][0]), direct + through
    direct, through = direct / total, through / total
    recursion = Recursion(c.lr if rate is None else rate, b1, 1 - b1, direct, through, c.keep)
    held = c.read("exp_avg") if buffer is None else buffer
    return Step(recursion, p if total == 1 else p / total, moment, buffer=held)


def first_correction(c: Coming) -> float:
    """Return what Adam's first moment is divided by, inverted; 1 where that is left out."""
    return 1 / c.start(float(c.group["betas"][0])) if c.cold_start else 1.0


def second_moment(c: Coming) -> tuple[Tensor, Tensor]:
    """Return Adam's v and sqrt(v/(1-b2^t)) + eps."""
    b2 = float(c.group["betas"][1])
    v = c.average_of_squares("exp_avg_sq", b2)
    if c.group.get("amsgrad", False):
        v = torch.maximum(v, c.read("max_exp_avg_sq"))
    root = v.sqrt().div_(math.sqrt(c.start(b2))).add_(float(c.group["eps"]))
    return v, root


def _advanced(buffer: Tensor | None, memory: float, taken_in: Tensor) -> Tensor:
    return taken_in if buffer is None else memory * buffer + taken_in
