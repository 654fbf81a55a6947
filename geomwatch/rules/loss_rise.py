"""The loss has risen well above the lowest it has been."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, Documented, between, group, level
from geomwatch.observation.loss_scale import LossScale
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import LossAdvice
from geomwatch.rules.calm import Calm, Waited
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule


@dataclass(frozen=True, kw_only=True, repr=False)
class StartOfLosses(Documented):
    """First steps, near the limit, that teach nothing."""

    steps: int = level(10, "losses that make a start", source="decision 015")
    last: int = level(5, "of them whose median counts", source="decision 015")
    healed: int = level(5, "losses in which a spike heals, if it does", source="decision 020")
    rise: float = level(0.05, "share of the first loss, median above it", source="decision 015")
    spike: float = level(0.4, "share of the first loss, one above it", source="decision 020: a GPT")
    margin: float = level(0.6, "margin that makes the rate suspect", source="decision 015")
    margin_full_batch: float = level(3.0, "the same in full-batch training", source="decision 015")
    items: int = level(16, "items in a batch; of fewer one loss says little", source="decision 015")


@dataclass(frozen=True, kw_only=True, repr=False)
class Means(Documented):
    """The exponential mean of the losses and of their noise."""

    smoothing: float = level(
        0.8, "weight of the past in the mean loss", source=GUESS, check=between(0, 1)
    )
    noise_smoothing: float = level(
        0.98, "weight of the past in its noise", source=GUESS, check=between(0, 1)
    )
    young: int = level(10, "losses until noise is known", source=GUESS)
    least: int = level(5, "losses before there is a minimum", source=GUESS)


@dataclass(kw_only=True, eq=False, repr=False)
class LossRise(LatchedRule):
    """Warns when the smoothed loss rises above its running minimum.

    EMA(loss) - min EMA > max(share fall, noise sd of a single loss), and the last `in_a_row` losses
    as well; fall is what the EMA has come down by to its minimum. Critical at once when the EMA
    exceeds the first loss by the same amount, if there was a fall. No unit but the run's own, so
    that losses may start near 0 or change sign. Nothing is said unless the last batches have a
    higher loss at the present weights than when the run saw them, by `worse` errors: else it is the
    data or the target that has changed, as in policy gradients. Warns as well when the steps of the
    `start`, near the limit, teach nothing: one of the last of their losses is far above the first,
    or their median a little. Curvature does not announce every failure (bad data, for one); this is
    the rule beside it. The rate it advises is that of the margins of the last `span` steps, within
    bounds.
    """

    name = "loss_rise"
    says = ("warning", "critical")

    share: float = level(
        0.3, "share of what the mean has come down by that it rises", source="decision 014"
    )
    noise: float = level(3.0, "standard deviations of one loss that it rises", source=GUESS)
    in_a_row: int = level(
        3, "losses that must be above too", source="32 runs with batches of 1 to 4"
    )
    means: Means = group(Means, "how losses are averaged")
    calm: float = level(
        0.5, "share of that rise below which it is over", source=GUESS, check=between(0, 1)
    )
    worse: float = level(
        2.0,
        "standard errors by which the last batches must have got worse",
        source="theory: two are 95 %",
    )
    start: StartOfLosses = group(StartOfLosses, "the first steps")
    span: int = level(60, "steps whose margins the advice goes by", source=GUESS)
    advice: LossAdvice = group(LossAdvice, "the rate to go on at")

    _first: Kept[float | None] = field(init=False, default=None)
    _last: Kept[deque[float]] = field(init=False)
    _margin: Kept[float] = field(init=False, default=0.0)  # the largest of the start
    _scale: Kept[LossScale] = field(init=False)
    _elsewhere: Kept[int] = field(init=False, default=0)  # until which loss that is believed
    _along: Kept[RecentMargins] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._last = deque(maxlen=max(self.start.last, self.in_a_row))
        self._along = RecentMargins(self.span)
        self._scale = LossScale(
            smoothing=self.means.smoothing,
            noise_smoothing=self.means.noise_smoothing,
            most=self.noise,
            young=self.means.young,
            least=self.means.least,
        )

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the loss of the step before, or of a probe when the loop passes no losses."""
        if step.gradient_fresh and step.gradient_margin_now is not None:
            self._along.add(step.index, step.rate, step.gradient_margin_now)
        loss, index = self._loss_of(step)
        if loss is None or not math.isfinite(loss):
            return None
        first = self._update(loss)
        if self._scale.count <= self.start.steps:
            stuck = self._judge_start(step, index, first)
            if stuck is not None:
                return stuck
        return None if self._scale.lowest is None else self._judge_rise(step, index, first)

    def _judge_rise(self, step: Observation, index: int, first: float) -> Alert | None:
        scale = self._scale
        smooth, lowest = scale.mean, scale.mean if scale.lowest is None else scale.lowest
        limit = self._limit(lowest)
        if smooth - lowest <= limit:
            if self._latch.severity:
                is_calm = smooth - lowest < self.calm * limit
                self._latch.calm(index) if is_calm else self._latch.between()
            return None
        severity: Severity = "critical" if smooth > first + limit else "warning"
        is_lost = severity == "critical" and limit <= self.share * scale.fallen
        if not is_lost and min(list(self._last)[-self.in_a_row :]) <= lowest + limit:
            return None
        if not self._latch.is_news(severity) or self._is_elsewhere(step, index):
            return None
        if not self._latch.admit(severity, index):
            return None
        limit += lowest
        factor = self._factor(step)
        message = (
            f"{self.advice.lower_rate(step, factor, is_lost=severity == 'critical')}, and look at "
            f"the last batches. The loss has risen to {smooth:.4g} from its lowest {lowest:.4g} "
            f"(alert above {limit:.4g}; the first was {first:.4g})."
        )
        return self._sent(step, severity, message, smooth, limit, index, factor)

    def _limit(self, lowest: float) -> float:
        """Return by how much the mean has to rise."""
        scale, rounding = self._scale, 2**-20 * abs(lowest)  # a few units of float32
        return max(self.share * scale.fallen, self.noise * scale.noise, rounding)

    def lets_wait(self) -> Calm | None:
        """Let losses wait that are far below what would be a rise, once the start is over."""
        lowest = self._scale.lowest
        if lowest is None or self._latch.severity or self._scale.count <= self.start.steps:
            return None
        return Calm(losses=(-math.inf, lowest + self.calm * self._limit(lowest)))

    def waited(self, steps: Waited) -> None:
        """Take in losses that are far below a rise."""
        for settled, _ in steps:
            if settled.loss is not None:
                self._update(settled.loss)

    def _is_elsewhere(self, step: Observation, index: int) -> bool:
        """Tell whether the weights have got no worse on the last batches: the data, or the target.

        Believed for a while, as a look back costs a forward pass for each of these batches.
        """
        if index < self._elsewhere:
            return True
        change = step.rehearsals.hindsight()
        if change is None or change > self.worse:
            return False
        self._elsewhere = index + self.once.cooldown
        return True

    def _factor(self, step: Observation, *, margin: float | None = None) -> float:
        gradient, _ = self._along.mean(step.index, step.rate, steps=self.span)
        return self.advice.factor_of_loss(step, margin=margin, gradient=gradient)

    def _sent(
        self,
        step: Observation,
        severity: Severity,
        text: str,
        value: float,
        limit: float,
        index: int,
        factor: float,
    ) -> Alert:
        advised = factor * step.rate
        return alert(
            self.name, severity, text, value=value, limit=limit, step=index, advised_lr=advised
        )

    def _judge_start(self, step: Observation, index: int, first: float) -> Alert | None:
        """Warn of first steps that teach nothing, where the rate is a likely reason."""
        start = self.start
        if step.margin is not None and step.has_limit:
            self._margin = max(self._margin, step.margin.value or 0.0)
        level = start.margin_full_batch if step.same_data else start.margin
        is_suspect = self._margin > level and step.items >= start.items
        if not is_suspect or self._scale.count <= start.healed:
            return None
        shown, loss, limit = "a loss", self._last[-1], first + start.spike * abs(first)
        if loss <= limit and self._scale.count == start.steps:
            last = list(self._last)[-start.last :]
            shown, loss = f"the median of the last {start.last}", statistics.median(last)
            limit = first + start.rise * abs(first)
        if loss <= limit or not self._latch.admit("warning", index):
            return None
        factor = self._factor(step, margin=self._margin)
        message = (
            f"{self.advice.lower_rate(step, factor, is_lost=True)}, or with a warm-up. The first "
            f"losses do not fall: {shown} is {loss:.4g}, the first was {first:.4g} (alert above "
            f"{limit:.4g}), and the stability margin has been up to {self._margin:.2g}."
        )
        return self._sent(step, "warning", message, loss, limit, index, factor)

    def _loss_of(self, step: Observation) -> tuple[float | None, int]:
        if step.settled is not None and step.settled.loss is not None:
            return step.settled.loss, step.settled.step
        return step.loss, step.index

    def _update(self, loss: float) -> float:
        """Take in a loss; return the first one."""
        self._first = loss if self._first is None else self._first
        self._scale.update(loss)
        self._last.append(loss)
        return self._first
