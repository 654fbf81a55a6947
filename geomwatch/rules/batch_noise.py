"""A start whose batches disagree more than steps of this size can average out."""

from __future__ import annotations

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.batch_noise import YOUNG, NoisePart, noise_part
from geomwatch.observation.levels import items_of
from geomwatch.observation.step import Observation
from geomwatch.observation.trust import Trust
from geomwatch.records import Alert
from geomwatch.rules.advice import lower_rate, rate_factor
from geomwatch.rules.deferred import Deferred
from geomwatch.rules.message import alert, carried_by, larger_batch
from geomwatch.rules.rule import Latch

_AT_ONCE = 1.0  # noise of SGD that is told of before the first step


class BatchNoise(Resumable):
    """Warns when the noise part of the stochastic margin is too large in the first ten steps.

    N = M_ms - M, what batches that differ in curvature add to the margin (see
    `estimators.stochastic_margin`); M_ms < 1 is stability of the mean square of steps. N grows
    about tenfold as the loss falls, so that a start must have a fraction of the limit: a warning
    when

        N > 0.3     SGD, from step 0 on,
        N > 1.8     methods that adapt, from step 2 on,

    and for these before that when N > 4 and M > 0.6. Measured by the first probe, and again at
    steps 5 and 8 where it is near its level (see `SecondLook`). What the first probe found is said
    at the second step, unless it is SGD and N > 1, which a single step may ruin: full-batch
    training shows itself there, and bears more.
    """

    name = "batch_noise"

    _latch: Kept[Latch]
    _trust: Kept[Trust]
    _kept: Kept[Deferred]

    def __init__(self) -> None:
        self._latch = Latch()
        self._trust = Trust()
        self._kept = Deferred()

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe of the first steps that has measured micro-batches."""
        doubt = self._trust(step)
        found = noise_part(step) if step.index in YOUNG and not doubt else None
        if found is None or found.excess(step) <= 1 or not self._latch.admit("warning", step.index):
            return self._kept.release(step)
        if step.index == 0 and (step.adaptive or found.value <= _AT_ONCE):
            self._kept.keep(self._told(step, found, is_late=True))
            return None
        return self._told(step, found)

    def _told(self, step: Observation, found: NoisePart, *, is_late: bool = False) -> Alert:
        return alert(
            self.name,
            "warning",
            _text(step, found, is_late),
            value=found.value,
            limit=found.level(step),
            step=step.index,
            layers=step.layers,
        )


def _text(step: Observation, found: NoisePart, is_late: bool) -> str:
    factor = min(rate_factor(step), found.factor(step))
    return (
        f"batches of {items_of(step)} disagree too much on the curvature for a learning rate of "
        f"{max(step.lr):.3g} with {step.optimizer}: they add {found.value:.2g} ± {found.error:.2g} "
        f"to a stability margin of {found.margin:.2g} (alert above {found.level(step):g} in the "
        f"first {YOUNG.stop - 1} steps, unstable at 1; it grows as the loss falls)"
        f"{carried_by(step)}. {lower_rate(step, factor, is_late=is_late)}{larger_batch(factor)}."
    )
