"""Before the first step: the margin at the highest rate that the schedule is headed for."""

from __future__ import annotations

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.batch_noise import NoisePart, noise_part
from geomwatch.observation.levels import items_of
from geomwatch.observation.margins import growth
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity, format_estimate
from geomwatch.rules.deferred import Deferred
from geomwatch.rules.message import alert, carried_by, larger_batch

_WARNING, _CRITICAL, _AT_ONCE = 3.0, 5.0, 10.0
_TARGET = 1.0  # that the advice aims for
_AHEAD = 1.05  # times the first rate: else there is no plan, and `stability_margin` judges


class PlannedRate(Resumable):
    """Asks what the margin would be if the planned peak were applied to the first weights.

    M(0) * peak / lr(0) > 3 is a warning, > 5 critical, at the first step that moves the weights;
    a warm-up that starts at 0 is judged at its first positive rate. Curvature changes on the way
    up, mostly down, so that this is a forecast and no measurement: peaks of up to 2.4 train well.
    Where every step sees the same data curvature follows the rate down, and forecasts of 4 to 10
    train well too. Whether that is so shows at the second step, so that a forecast below 10 is kept
    for it, and dropped there.

    A warning as well where the noise part of the stochastic margin, at the peak, would be too much
    for a start (see `BatchNoise`). The highest rates are those that the groups of the
    optimizer carry (see `planned_rates`).
    """

    name = "planned_rate"

    _under_way: Kept[bool]
    _kept: Kept[Deferred]

    def __init__(self) -> None:
        self._under_way = False
        self._kept = Deferred()

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the first step at a positive rate, and say so there or at the next one."""
        if self._under_way:
            return self._kept.release(step)
        if max(step.lr, default=0.0) <= 0:
            return None
        self._under_way = True
        found = self._judged(step)
        if found is not None and found.value <= _AT_ONCE:
            self._kept.keep(found)
            return None
        return found

    def _judged(self, step: Observation) -> Alert | None:
        margin = step.margin
        if not step.fresh or margin is None or margin.value is None or margin.status != "ok":
            return None
        ahead = growth(step.peak, step.lr)
        if ahead < _AHEAD:
            return None
        expected, noise = margin.value * ahead, noise_part(step)
        excess = 0.0 if noise is None else noise.excess(step, growth=ahead)
        if expected <= _WARNING and noise is not None and excess > 1:
            return self._noisy(step, noise, ahead)
        return self._steep(step, expected) if expected > _WARNING else None

    def _steep(self, step: Observation, expected: float) -> Alert:
        """Return the alert of a margin that the peak would bring beyond its limit."""
        assert step.margin is not None
        severity: Severity = "critical" if expected > _CRITICAL else "warning"
        level = _CRITICAL if severity == "critical" else _WARNING
        few = "no peak" if severity == "critical" else "few peaks"
        peak, factor = max(step.peak), _TARGET / expected
        text = (
            f"the schedule is headed for a learning rate of {peak:.3g}, at which the stability "
            f"margin of {step.optimizer} would be {expected:.2g} in the present weights (alert "
            f"above {level:g}, unstable at 1; {format_estimate(step.margin)} at the "
            f"{max(step.lr):.3g} of this step){carried_by(step)}. Curvature may give way during a "
            f"warm-up, but {few} above {level:g} trained in the runs behind this level. "
            f"Lower the peak to about {peak * factor:.1g} ({factor:.2g} x), or warm up for longer."
        )
        return self._sent(step, severity, text, expected, level)

    def _noisy(self, step: Observation, noise: NoisePart, ahead: float) -> Alert:
        """Return the alert of batches that disagree too much for the peak."""
        expected, level, peak = (
            ahead * noise.value,
            noise.level(step, planned=True),
            max(step.peak),
        )
        factor = noise.factor(step, growth=ahead)
        text = (
            f"the schedule is headed for a learning rate of {peak:.3g}, at which batches of "
            f"{items_of(step)} that disagree on the curvature would add {expected:.2g} to the "
            f"stability margin of {step.optimizer} in the present weights (alert above {level:g}, "
            f"unstable at 1; {noise.value:.2g} ± {noise.error:.2g} at the {max(step.lr):.3g} of "
            f"this step){carried_by(step)}. It grows as the loss falls, whatever the warm-up. "
            f"Lower the peak to about {peak * factor:.1g} ({factor:.2g} x){larger_batch(factor)}."
        )
        return self._sent(step, "warning", text, expected, level)

    def _sent(
        self, step: Observation, severity: Severity, text: str, value: float, limit: float
    ) -> Alert:
        return alert(
            self.name,
            severity,
            text,
            value=value,
            limit=limit,
            step=step.index,
            layers=step.layers,
        )
