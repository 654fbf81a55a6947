"""Before the first step: the margin at the highest rate that the schedule is headed for."""

from __future__ import annotations

from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.batch_noise import NoiseLevels, NoisePart, noise_part
from geomwatch.observation.documented import GUESS, Documented, above, group, level
from geomwatch.observation.gradient_level import items_of
from geomwatch.observation.margins import growth
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity, format_estimate
from geomwatch.rules.deferred import Deferring
from geomwatch.rules.message import alert, carried_by, larger_batch


@dataclass(kw_only=True, eq=False, repr=False)
class PlannedRate(Documented, Deferring):
    """Asks what the margin would be if the planned peak were applied to the first weights.

    M(0) * peak / lr(0) is judged at the first step that moves the weights; a warm-up that starts at
    0 at its first positive rate. Curvature changes on the way up, mostly down, so that this is a
    forecast and no measurement: peaks below `warning` train well. Where every step sees the same
    data curvature follows the rate down, and forecasts of twice as much train well too. Whether
    that is so shows at the second step, so that a forecast below `at_once` is kept for it, and
    dropped there.

    A warning as well where the noise part of the stochastic margin, at the peak, would be too much
    for a start (see `BatchNoise`): the stochastic margin there above 1, error bar and all. The
    highest rates are those that the groups of the optimizer carry (see `planned_rates`).
    """

    name = "planned_rate"
    reads = "probe"
    says = ("warning", "critical")

    warning: float = level(3.0, "margin at the peak: warning", source="138 runs: 2.4 trains well")
    critical: float = level(5.0, "margin at the peak: critical", source="138 runs: all failed")
    at_once: float = level(
        10.0,
        "margin at the peak: told at once",
        source="decision 020: five runs",
    )
    target: float = level(1.0, "margin at the peak: aim of the advice", source="theory")
    ahead: float = level(1.05, "times the first rate: a plan", source=GUESS, check=above(1))
    noise: NoiseLevels = group(NoiseLevels, "of N = M_ms - M")

    waits: Kept[bool] = field(init=False, default=True)  # for the first step that moves weights
    _under_way: Kept[bool] = field(init=False, default=False)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the first step at a positive rate, and say so there or at the next one."""
        if self._under_way:
            return self._released(step)
        if step.rate <= 0:
            return None
        self._under_way, self.waits = True, False
        found = self._judged(step)
        if found is not None and found.value <= self.at_once:
            self._defer(found)
            return None
        return found

    def _judged(self, step: Observation) -> Alert | None:
        margin, ahead = step.margin_now, growth(step.peak, step.lr)
        if margin is None or not step.has_limit or ahead < self.ahead:
            return None
        if margin * ahead > self.warning:
            return self._steep(step, margin * ahead)
        noise = noise_part(step, self.noise)
        if noise is None or noise.excess(step, growth=ahead) <= 1:
            return None
        return self._noisy(step, noise, ahead) if noise.is_beyond(growth=ahead) else None

    def _steep(self, step: Observation, expected: float) -> Alert:
        """Return the alert of a margin that the peak would bring beyond its limit."""
        assert step.margin is not None
        severity: Severity = "critical" if expected > self.critical else "warning"
        level = self.critical if severity == "critical" else self.warning
        few = "no peak" if severity == "critical" else "few peaks"
        peak, factor = max(step.peak), self.target / expected
        text = (
            f"Lower the peak of the schedule from {peak:.3g} to about {peak * factor:.2g} "
            f"({factor:.2g} x), or warm up for longer. The stability margin would be "
            f"{expected:.2g} there in the present weights (alert above {level:g}, unstable at 1)."
        )
        details = (
            f"It is {format_estimate(step.margin)} at the {step.rate:.3g} of this step with "
            f"{step.optimizer}{carried_by(step)}. Curvature may give way during a warm-up, but "
            f"{few} above {level:g} trained in the runs behind this level."
        )
        return self._sent(step, severity, text, expected, level, details)

    def _noisy(self, step: Observation, noise: NoisePart, ahead: float) -> Alert:
        """Return the alert of batches that disagree too much for the peak."""
        expected, level, peak = (
            ahead * noise.value,
            self.noise.at(step, planned=True),
            max(step.peak),
        )
        factor = noise.factor(step, growth=ahead)
        text = (
            f"Lower the peak of the schedule from {peak:.3g} to about {peak * factor:.2g} "
            f"({factor:.2g} x){larger_batch(factor)}. Batches of {items_of(step)} that disagree on "
            f"the curvature would add {expected:.2g} to the stability margin there (alert above "
            f"{level:g}, unstable at 1)."
        )
        details = (
            f"They add {noise.value:.2g} ± {noise.error:.2g} at the {step.rate:.3g} of this step "
            f"with {step.optimizer}{carried_by(step)}. It grows as the loss falls, whatever the "
            "warm-up."
        )
        return self._sent(step, "warning", text, expected, level, details)

    def _sent(
        self,
        step: Observation,
        severity: Severity,
        text: str,
        expected: float,
        level: float,
        details: str,
    ) -> Alert:
        return alert(
            self.name,
            severity,
            text,
            value=expected,
            limit=level,
            step=step.index,
            layers=step.layers,
            details=details,
        )
