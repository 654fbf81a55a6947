"""A start whose batches disagree more than steps of this size can average out."""

from __future__ import annotations

from dataclasses import dataclass

from geomwatch.observation.batch_noise import NoiseLevels, NoisePart, noise_part
from geomwatch.observation.documented import GUESS, group, level
from geomwatch.observation.gradient_level import items_of
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.advice import Advice
from geomwatch.rules.deferred import Deferring
from geomwatch.rules.message import alert, carried_by, larger_batch
from geomwatch.rules.rule import LatchedRule


@dataclass(kw_only=True, eq=False, repr=False)
class BatchNoise(Deferring, LatchedRule):
    """Warns when the noise part of the stochastic margin is too large in the first steps.

    N = M_ms - M, what batches that differ in curvature add to the margin (see
    `estimators.stochastic_margin`); M_ms < 1 is stability of the mean square of steps. A warning
    when M_ms is above 1 by two of its standard errors, and N above the level of `noise` for this
    optimizer, which takes M into account where it adapts and has seen one gradient. Measured by the
    first probe, and again at steps 5 and 8 where it is near its level (see `SecondLook`). What the
    first probe found is said at the second step, unless it is SGD and N is above `at_once`, which a
    single step may ruin: full-batch training shows itself there, and bears more.
    """

    name = "batch_noise"
    reads = "probe"
    says = ("warning",)

    noise: NoiseLevels = group(NoiseLevels, "of N = M_ms - M")
    at_once: float = level(1.0, "noise part of SGD told of before the first step", source=GUESS)
    advice: Advice = group(Advice, "the rate to go on at")

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe of the first steps that has measured micro-batches."""
        is_start = step.index <= self.noise.young
        found = noise_part(step, self.noise) if is_start and not step.doubt else None
        is_much = found is not None and found.excess(step) > 1 and found.is_beyond()
        if found is None or not is_much or not self._latch.admit("warning", step.index):
            return self._released(step)
        if step.index == 0 and (step.adaptive or found.value <= self.at_once):
            self._defer(self._alert(step, found, is_late=True))
            return None
        return self._alert(step, found)

    def _alert(self, step: Observation, found: NoisePart, *, is_late: bool = False) -> Alert:
        limit = self.noise.at(step)
        factor = min(self.advice.factor(step), found.factor(step))
        text = (
            f"{self.advice.lower_rate(step, factor, is_late=is_late)}{larger_batch(factor)}. "
            f"Batches of {items_of(step)} disagree too much on the curvature: they add "
            f"{found.value:.2g} ± {found.error:.2g} to the stability margin (alert above "
            f"{limit:g}, where the sum is beyond {self.noise.limit:g} by {self.noise.errors:g} "
            f"errors)."
        )
        details = (
            f"That is the limit of the first {self.noise.young} steps, as it grows when the loss "
            f"falls; the margin itself is {found.margin:.2g} with "
            f"{step.optimizer}{carried_by(step)}."
        )
        return alert(
            self.name,
            "warning",
            text,
            value=found.value,
            limit=limit,
            step=step.index,
            layers=step.layers,
            details=details,
            advised_lr=factor * step.rate,
        )
