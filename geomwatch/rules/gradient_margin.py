"""The curvature that the steps themselves meet nears the limit: what sentinels tell."""

from __future__ import annotations

from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, Documented, between, group, level
from geomwatch.observation.gradient_level import GradientLevels, items_of
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import Advice
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Denial, LatchedRule, SecondOpinion


@dataclass(frozen=True, kw_only=True, repr=False)
class FirstValues(Documented):
    """One value of SGD in the first steps, where a run that is lost shows it."""

    limit: float = level(22.0, "gradient margin: critical", source="decision 020")
    start: int = level(3, "first step: a spike before it may heal", source="decision 014")
    end: int = level(12, "last step of these", source="decision 014")


@dataclass(frozen=True, kw_only=True, repr=False)
class LastValues(Documented):
    """The mean of the last few values of SGD."""

    limit: float = level(13.0, "gradient margin: warning", source="decision 020")
    count: int = level(3, "measurements in the mean", source="decision 014")
    span: int = level(40, "steps that the mean looks back", source=GUESS)


@dataclass(frozen=True, slots=True)
class _Found:
    value: float
    level: float
    shown: str
    severity: Severity = "warning"

    @property
    def share(self) -> float:
        return self.value / self.level


@dataclass(kw_only=True, eq=False, repr=False)
class GradientMargin(LatchedRule):
    """Warns when the curvature along the steps is more than batches of this size survive.

    G = d'(H + W)d / g'd along the coming step d = S^2 g, in units of the limit of small batches
    (`limit_ratio` times further off is that of the full batch): what sentinels measure between
    probes, at a fraction of their cost. Healthy runs settle between the two limits, the higher the
    larger the batch. Geometric means, re-scaled to the present rate, warn above their levels: that
    of the last `span` steps and, of SGD, that of the `last` values. It is critical when a single
    value of SGD exceeds that of the `first` steps, or one at any step `at_once` times the limit of
    the full batch. How `levels` depend on the batch, on momentum and on how much batches agree is
    said in `GradientLevels`; `first` and `last` do alike.
    """

    name = "gradient_margin"
    reads = "look"
    says = ("warning", "critical")

    levels: GradientLevels = group(GradientLevels, "of the long mean")
    first: FirstValues = group(FirstValues, "one value of the first steps")
    last: LastValues = group(LastValues, "the short mean")
    at_once: float = level(2.0, "one value, in full-batch limits: critical", source=GUESS)
    at_once_full_batch: float = level(3.0, "the same in full-batch training", source=GUESS)
    calm: float = level(
        0.7, "share of its level below which it is over", source=GUESS, check=between(0, 1)
    )
    span: int = level(60, "steps that the long mean looks back", source="decision 014")
    least: int = level(4, "measurements in the long mean, at least", source=GUESS)
    warm_up: int = level(20, "first steps, in which the long mean does not count", source=GUESS)
    advice: Advice = group(Advice, "the rate to go on at")
    rehearsal: SecondOpinion = group(SecondOpinion, "steps ahead, before an alert")

    _denied: Kept[Denial] = field(init=False)
    _recent: Kept[RecentMargins] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._denied = Denial(self.rehearsal)
        self._recent = RecentMargins(max(self.span, self.last.count))

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a sentinel, beside what was measured along the gradient by probes."""
        now = step.gradient_margin_now
        if now is None or step.rate <= 0 or not step.has_limit:
            return None
        self._recent.add(step.index, step.rate, now)
        judged = [*self._judged_once(step, now), *self._judged_means(step)]
        judged.append(_Found(0.0, 1.0, ""))
        found = max(judged, key=lambda f: (f.share > 1 and f.severity == "critical", f.share))
        if found.share <= 1:
            self._latch.calm(step.index) if found.share < self.calm else self._latch.between()
            return None
        if not self._latch.is_news(found.severity) or self._denied(step, found.share):
            return None
        if not self._latch.admit(found.severity, step.index):
            return None
        return self._alert(step, found)

    def _judged_once(self, step: Observation, now: float) -> list[_Found]:
        """Hold one value against its levels."""
        judged, first, shown = [], self.first, "measured once"
        if step.index > 0 and not step.fresh:  # of a probe StabilityMargin speaks
            limits = self.at_once_full_batch if step.same_data else self.at_once
            judged.append(_Found(now, limits * step.limit_ratio, shown, "critical"))
        if _is_plain(step) and first.start <= step.index <= first.end:
            judged.append(_Found(now, self._level(step, first.limit), shown, "critical"))
        return judged

    def _judged_means(self, step: Observation) -> list[_Found]:
        """Hold the means against their levels."""
        judged, last = [], self.last
        mean, count = self._recent.mean(step.index, step.rate, steps=self.span)
        if mean is not None and count >= self.least and step.index >= self.warm_up:
            shown = f"mean of {count} measurements in {self.span} steps"
            judged.append(_Found(mean, self._level(step), shown))
        mean, count = self._recent.mean(step.index, step.rate, steps=last.span, most=last.count)
        if mean is None or count < last.count or step.index < self.first.start:
            return judged
        if _is_plain(step):
            shown = f"mean of the last {count} measurements"
            judged.append(_Found(mean, self._level(step, last.limit), shown))
        return judged

    def _level(self, step: Observation, at_64: float | None = None) -> float:
        return self.levels.at(step, at_64, is_quiet=step.is_quiet)

    def _alert(self, step: Observation, found: _Found) -> Alert:
        factor = self.advice.factor(
            step, gradient=found.value, levels=self.levels, is_quiet=step.is_quiet
        )
        agreeing = " that agree on the curvature" if step.is_quiet else ""
        batch = f"batches of {items_of(step)}{agreeing}"
        batch = "full-batch training" if step.same_data else batch
        text = (
            f"{self.advice.lower_rate(step, factor)}, or end its warm-up there. Curvature along "
            f"the steps is {found.value:.3g} x the limit of small batches (alert above "
            f"{found.level:.3g})."
        )
        details = (
            f"{found.shown.capitalize()}: more than {batch} survive for long with "
            f"{step.optimizer}; the full batch would allow {step.limit_ratio:.3g}."
        )
        return alert(
            self.name,
            found.severity,
            text,
            value=found.value,
            limit=found.level,
            step=step.index,
            details=details,
            advised_lr=factor * step.rate,
        )

    def level_at(self, step: Observation) -> float:
        """Return what the long mean is held against at this step."""
        return self._level(step)


def _is_plain(step: Observation) -> bool:
    """Tell whether these are mini-batches under SGD."""
    return not (step.adaptive or step.same_data)
