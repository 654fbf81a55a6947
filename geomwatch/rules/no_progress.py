"""Steps that change nothing: no gradient, updates that round away, a rate that is far too small."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, between, level
from geomwatch.observation.movement import Movement
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.calm import Calm, Waited
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule


@dataclass(kw_only=True, eq=False, repr=False)
class NoProgress(LatchedRule):
    """Warns of steps that change nothing, which no loss that stays where it is tells apart.

    The gradient is exactly zero; or most of the weights that have a gradient do not change by a
    bit, because updates are below half a unit in their last place; or all of them change by so
    little that a run will not end. Silent at a rate of zero, while the rate rises or is headed for
    more, and below half of the highest so far: schedules begin and end so. Silent once the loss
    has fallen well below its first value.
    """

    name = "no_progress"
    reads = "norm"
    says = ("warning",)

    zeros: int = level(3, "gradients in a row that are exactly zero", source=GUESS)
    still: float = level(
        0.5, "share of weights that do not move", source="theory: most", check=between(0, 1)
    )
    least: float = level(
        1e-7, "relative change per step", source="theory: a million steps move weights by a tenth"
    )
    spans: int = level(2, "comparisons in a row that must say so", source=GUESS)
    fallen: float = level(
        0.8, "share of the first loss: progress was made", source=GUESS, check=between(0, 1)
    )
    smoothing: float = level(
        0.8, "weight of the past in the mean loss", source=GUESS, check=between(0, 1)
    )

    _zeros: Kept[int] = field(init=False, default=0)
    _still: Kept[int] = field(init=False, default=0)
    _slow: Kept[int] = field(init=False, default=0)
    _highest: Kept[float] = field(init=False, default=0.0)  # rate
    _first: Kept[float | None] = field(init=False, default=None)
    _mean: Kept[float] = field(init=False, default=0.0)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the gradient of the step before, and what became of the weights."""
        self._highest = max(self._highest, step.rate)
        settled = step.settled
        if settled is not None and settled.loss is not None and math.isfinite(settled.loss):
            self._note(settled.loss)
        norm = None if settled is None else settled.grad_norm
        if settled is not None and norm is not None:
            is_zero = norm == 0 and settled.loss != 0 and not math.isnan(settled.loss or 0.0)
            self._zeros = self._zeros + 1 if is_zero else 0
            if self._zeros >= self.zeros:
                return self._say(step, _no_gradient(self._zeros), 0.0, 0.0)
        return None if step.movement is None else self._judge(step, step.movement)

    def lets_wait(self) -> Calm:
        """Let all gradients wait that are none of zero."""
        return Calm(norms=(0.0, math.inf))

    def waited(self, steps: Waited) -> None:
        """Take note of gradients that are not zero."""
        for settled, _ in steps:
            if settled.grad_norm is not None:
                self._zeros = 0
                if settled.loss is not None:
                    self._note(settled.loss)

    def _judge(self, step: Observation, moved: Movement) -> Alert | None:
        counts = self._is_steady(step, moved) and not self._has_fallen()
        per_step = moved.relative / moved.steps
        self._still = self._still + 1 if counts and moved.still > self.still else 0
        self._slow = self._slow + 1 if counts and per_step < self.least else 0
        if self._still >= self.spans:
            return self._say(step, self._rounded(step, moved), moved.still, self.still)
        if self._slow >= self.spans:
            return self._say(step, self._crawling(step, per_step), per_step, self.least)
        if not (self._still or self._slow or self._zeros):
            self._latch.calm(step.index)
        return None

    def _is_steady(self, step: Observation, moved: Movement) -> bool:
        rate, headed = step.rate, max(step.peak, default=0.0)
        is_rising = rate > moved.rate or headed > rate
        return rate > 0 and moved.rate > 0 and not is_rising and 2 * rate >= self._highest

    def _note(self, loss: float) -> None:
        if self._first is None:
            self._first = self._mean = loss
        self._mean += (1 - self.smoothing) * (loss - self._mean)

    def _has_fallen(self) -> bool:
        first = self._first
        return first is not None and first - self._mean > (1 - self.fallen) * abs(first)

    def _say(self, step: Observation, text: str, value: float, limit: float) -> Alert | None:
        if not self._latch.admit("warning", step.index):
            return None
        return alert(self.name, "warning", text, value=value, limit=limit, step=step.index)

    def _rounded(self, step: Observation, moved: Movement) -> str:
        return (
            f"{moved.still:.0%} of the weights have not changed by a bit in {moved.steps} steps, "
            f"although they have gradients: updates at a learning rate of {step.rate:.2g} round "
            f"away in {moved.dtype}. Keep the weights in float32 (autocast for the forward pass), "
            "use an optimizer that keeps a float32 copy or rounds at random, or raise the rate."
        )

    def _crawling(self, step: Observation, per_step: float) -> str:
        return (
            f"a step changes the weights by {per_step:.1g} of their size (alert below "
            f"{self.least:.1g}): at a learning rate of {step.rate:.2g} nothing will be learned. "
            "Raise it, or look for what makes gradients so small, such as a loss that is divided "
            "twice."
        )


def _no_gradient(count: int) -> str:
    return (
        f"the gradient has been exactly zero {count} times in a row, and the loss is not: nothing "
        "is learned. Look for units that are all dead or saturated, for an output that is detached "
        "or rounded, and for labels that are all masked."
    )
