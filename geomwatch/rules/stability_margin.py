"""The learning rate is near, or beyond, what the curvature allows."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, Documented, above, between, group, level, whole
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity, format_estimate
from geomwatch.rules.advice import Advice
from geomwatch.rules.message import alert, batch_advice, carried_by
from geomwatch.rules.rule import Denial, LatchedRule, Persistence, SecondOpinion


@dataclass(frozen=True, kw_only=True, repr=False)
class FullBatchLevels(Documented):
    """Levels of training that sees the same data at every step: it lives at the limit."""

    edge: float = level(0.9, "mean margin: edge of stability, info", source="Cohen et al. 2021")
    warning: float = level(1.3, "mean margin: warning, if the loss rises", source=GUESS)
    critical: float = level(
        2.0,
        "mean margin: critical if it lasts",
        source="runs survived 2 to 2.75",
    )
    at_once: float = level(3.0, "one margin: critical", source="runs diverged above 3")


@dataclass(frozen=True, kw_only=True, repr=False)
class StartLevels(Documented):
    """The first steps, which may leave sharp weights by a harmless catapult."""

    at_once: float = level(10.0, "one margin at step 0: critical", source=GUESS)
    warm_up: int = level(10, "first steps, without warnings", source=GUESS, check=whole(0))


@dataclass(frozen=True, kw_only=True, repr=False)
class OwnPast(Documented):
    """What a run of an optimizer without a formula is held against: its own medians."""

    margin: float = level(
        2.0,
        "times the median of eta lambda_max",
        source="192 runs",
        check=above(1),
    )
    loss: float = level(1.5, "times the median of the loss", source="192 runs", check=above(1))
    least: int = level(5, "measurements before there is a usual", source=GUESS)
    most: int = level(20, "measurements that make it", source=GUESS)


@dataclass(frozen=True, kw_only=True, repr=False)
class LastProbes(Documented):
    """The geometric mean of the last few measurements."""

    probes: int = level(3, "measurements in a mean, at most", source="decision 005")
    span: int = level(60, "steps that a mean looks back", source=GUESS)


@dataclass(kw_only=True, eq=False, repr=False)
class StabilityMargin(LatchedRule):
    """Warns when lr * curvature comes near the limit of the optimizer.

    M = lambda_max(S (H + W) S) < 1 is linear stability (see `stability`). One batch differs from
    the next by more than a probe errs, so the rule judges the geometric mean of the last few of
    them, re-scaled to the present learning rate, against 1: a Ritz value is a lower bound
    of the largest eigenvalue, so that a margin above 1 is above it for certain. Critical needs it
    there for `persistence` steps, or one measurement beyond `at_once`. Where every step sees the
    same data, levels are those of the edge of stability and the loss must rise too. For optimizers
    without a formula lr * lambda_max must stay above its own usual, and the loss above its own, for
    `persistence` steps: curvature alone also grows in a healthy run, up to eightfold, while the
    loss falls. A margin that can't be believed (see `Observer`) is passed over.
    """

    name = "stability_margin"
    reads = "probe"
    says = ("info", "warning", "critical")

    warning: float = level(1.0, "mean margin: warning", source="theory: the limit")
    critical: float = level(1.0, "mean margin: critical if it lasts", source="theory: the limit")
    at_once: float = level(2.5, "one margin: critical", source="decision 020")
    full_batch: FullBatchLevels = group(FullBatchLevels, "where every step sees the same data")
    start: StartLevels = group(StartLevels, "the first steps")
    own_past: OwnPast = group(OwnPast, "optimizers without a formula")
    calm: float = level(
        0.7,
        "share of the warning level below which it is over",
        source=GUESS,
        check=between(0, 1),
    )
    mean: LastProbes = group(LastProbes, "what is held against the levels")
    persistence: int = level(
        5, "steps that a mean must last", source="decision 005", check=whole(0)
    )
    advice: Advice = group(Advice, "the rate to go on at")
    rehearsal: SecondOpinion = group(SecondOpinion, "steps ahead, before an alert")

    _denied: Kept[Denial] = field(init=False)
    _persistent: Kept[Persistence] = field(init=False)
    _lasting: Kept[Persistence] = field(init=False)  # the same for warnings
    _recent: Kept[RecentMargins] = field(init=False)
    _history: Kept[deque[tuple[float, float]]] = field(init=False)  # lr * lambda_max, loss
    _loss_before: Kept[float | None] = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._denied = Denial(self.rehearsal)
        self._persistent, self._lasting = (Persistence(self.persistence) for _ in range(2))
        self._recent = RecentMargins(self.mean.probes)
        self._history = deque(maxlen=self.own_past.most)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the margin of one step; only a fresh measurement can raise an alert."""
        margin = step.margin_now
        if step.doubt or margin is None:
            return None
        if not step.has_limit:
            return self._against_own_past(step, margin)
        self._recent.add(step.index, step.rate, margin)
        mean, count = self._recent.mean(step.index, step.rate, steps=self.mean.span)
        if mean is None:  # at a rate of 0
            mean, count = margin, 1
        severity = self._severity(step, margin, mean, count)
        if severity is None:
            is_calm = mean < self.calm * self._levels(step).warning
            self._latch.calm(step.index) if is_calm else self._latch.between()
            return None
        return self._said(step, severity, margin, mean, count)

    def _said(
        self, step: Observation, severity: Severity, margin: float, mean: float, count: int
    ) -> Alert | None:
        """Let an alert out that is news and that no rehearsal denies."""
        is_news = self._latch.is_news(severity)
        if not is_news or (severity != "info" and self._denied(step, max(margin, mean))):
            return None
        if not self._latch.admit(severity, step.index):
            return None
        if severity == "info":
            return self._at_the_edge(step, mean)
        return self._beyond(step, severity, margin, mean, count)

    def _levels(self, step: Observation) -> FullBatchLevels | StabilityMargin:
        return self.full_batch if step.same_data else self

    def _severity(
        self, step: Observation, margin: float, mean: float, count: int
    ) -> Severity | None:
        levels = self._levels(step)
        persistent = self._persistent(mean > levels.critical and step.index > 0, step.index)
        # Two recent measurements above the level, or two that lie further apart.
        lasting = self._lasting(mean > levels.warning, step.index) or count >= 2
        trouble = self._loss_rises(step) or not step.same_data
        if step.index == 0:
            return "critical" if margin > self.start.at_once else None
        young = step.index < self.start.warm_up
        # Full-batch training leaves sharp weights by a catapult, with a passing rise of the loss.
        if margin > levels.at_once or (persistent and trouble and not (step.same_data and young)):
            return "critical"
        if mean > levels.warning and lasting and not young and trouble:
            return "warning"
        at_the_edge = step.same_data and self.full_batch.edge <= mean <= levels.warning
        return "info" if at_the_edge else None

    def _loss_rises(self, step: Observation) -> bool:
        before, now = self._loss_before, step.loss
        self._loss_before = now if now is not None else before
        return before is None or now is None or now > before

    def _at_the_edge(self, step: Observation, mean: float) -> Alert:
        assert step.margin is not None
        text = (
            f"at the edge of stability: margin {format_estimate(step.margin)} with the same data "
            "at each step. This is where full-batch training settles; no action needed."
        )
        return self._sent(step, "info", text, mean, self.full_batch.edge)

    def _beyond(
        self, step: Observation, severity: Severity, margin: float, mean: float, count: int
    ) -> Alert:
        """Return the alert of a margin near or beyond its limit."""
        assert step.margin is not None
        levels, shown, value = self._levels(step), format_estimate(step.margin), mean
        level = levels.critical if severity == "critical" else levels.warning
        if step.index == 0 or (severity == "critical" and margin > levels.at_once):
            level, value = levels.at_once if step.index else self.start.at_once, margin
        elif count > 1:
            shown = f"{mean:.2f} over the last {count} probes, {shown} now"
        beyond = "is beyond" if value > 1 else "comes close to"
        rising = ", and the loss rises" if step.same_data else ""
        factor = self.advice.factor(step, margin=value, is_quiet=step.is_quiet)
        text = (
            f"{self.advice.lower_rate(step, factor)}, or end its warm-up there. The stability "
            f"margin is {shown} (alert above {level:g}, unstable at 1){rising}."
        )
        details = (
            f"The rate {beyond} what the curvature allows for "
            f"{step.optimizer}{_curvature(step, margin)}{carried_by(step)}."
            f"{batch_advice(value, step.noise)}"
        )
        advised = factor * step.rate
        return self._sent(step, severity, text, value, level, details=details, advised_lr=advised)

    def _against_own_past(self, step: Observation, margin: float) -> Alert | None:
        """Judge lr x lambda_max of an optimizer without a formula."""
        if step.loss is None:
            return None
        past, usual, usual_loss = self.own_past, math.inf, math.inf
        if len(self._history) >= past.least:
            usual, usual_loss = map(statistics.median, zip(*self._history, strict=True))
        self._history.append((margin, step.loss))
        loss_limit = usual_loss + (past.loss - 1) * abs(usual_loss)
        present = margin > past.margin * usual > 0 and step.loss > loss_limit
        if not self._persistent(present, step.index):
            if not present:
                self._latch.calm(step.index)
            return None
        if not self._latch.admit("warning", step.index):
            return None
        text = (
            f"lr x λ_max has risen to {margin:.3g}, {margin / usual:.1f} times its median in this "
            f"run, and the loss to {step.loss:.4g} from a median of {usual_loss:.4g} (alert above "
            f"{past.margin:g} times the median with the loss above {loss_limit:.4g}; no stability "
            f"limit is known for {step.optimizer}){carried_by(step)}. Lower the learning rate if "
            "the loss goes on rising."
        )
        return self._sent(step, "warning", text, margin, past.margin * usual)

    def _sent(
        self,
        step: Observation,
        severity: Severity,
        text: str,
        value: float,
        limit: float,
        **more: Any,
    ) -> Alert:
        return alert(
            self.name,
            severity,
            text,
            value=value,
            limit=limit,
            step=step.index,
            layers=step.layers,
            **more,
        )


def _curvature(step: Observation, margin: float) -> str:
    found = step.measured("lambda_max")
    if found is None or found.value is None or found.age or not margin:
        return ""
    limit = found.value / margin
    return f"; λ_max {format_estimate(found)}, stable below {limit:.3g} at this rate"
