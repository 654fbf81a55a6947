"""The curvature that the steps themselves meet nears the limit: what sentinels tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.levels import gradient_level, items_of
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.regime import Regime
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import lower_rate, rate_factor
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Latch

_SHORT = 13.0  # at 64 items: of SGD over the last three,
_FIRST = 22.0  # and of SGD in one of the first steps, in units of the small-batch limit
_AT_ONCE, _EDGE_AT_ONCE = 2.0, 3.0  # of one measurement, in units of the full-batch limit
_RELEASE = 0.7  # of the level
_LONG_SPAN, _SHORT_SPAN = 60, 40  # steps that the means look back
_ENOUGH, _THREE = 4, 3  # measurements in them
_YOUNG = range(3, 13)  # steps
_WARM_UP = 20  # steps


@dataclass(frozen=True, slots=True)
class _Found:
    share: float  # of the level
    value: float
    level: float
    shown: str
    severity: Severity = "warning"


class GradientMargin(Resumable):
    """Warns when the curvature along the steps is more than batches of this size survive.

    G = d'(H + W)d / g'd along the coming step d = S^2 g, in units of the limit of small batches
    (`limit_ratio` times further off is that of the full batch): what sentinels measure between
    probes, at a fraction of their cost. Healthy runs settle between the two limits, the higher the
    larger the batch B. Of geometric means, re-scaled to the present rate, it is a warning when

        over 60 steps   G > 7 (B/64)^(1/3)    (12 for methods that adapt),
        over three      G > 13 (B/64)^(1/3)   (SGD),

    times sqrt(limit_ratio / 19), and 2.5 where batch noise is known to matter hardly at all (see
    `regime`); it is critical when a single value in steps 3 to 12 exceeds 22
    (B/64)^(1/3) (SGD), or one at any step twice the limit of the full batch. Where every step sees
    the same data the level is 1.3 of that limit.
    """

    name = "gradient_margin"

    _recent: Kept[RecentMargins]
    _latch: Kept[Latch]
    _regime: Kept[Regime]

    def __init__(self) -> None:
        self._recent = RecentMargins(_LONG_SPAN)
        self._latch = Latch()
        self._regime = Regime()

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a sentinel, beside what was measured along the gradient by probes."""
        self._regime(step)
        margin = step.gradient_margin
        if not step.gradient_fresh or margin is None or margin.value is None:
            return None
        if step.rate <= 0 or (step.margin is not None and step.margin.status != "ok"):
            return None
        self._recent.add(step.index, step.rate, margin.value)
        judged = self._judged(step, margin.value)
        found = max(judged, key=lambda f: (f.share > 1 and f.severity == "critical", f.share))
        if found.share <= 1:
            self._latch.calm(step.index) if found.share < _RELEASE else self._latch.between()
            return None
        if not self._latch.admit(found.severity, step.index):
            return None
        return self._alert(step, found)

    def _judged(self, step: Observation, now: float) -> list[_Found]:
        """Hold one value and the means against their levels."""
        judged = [_Found(0.0, now, math.inf, "")]
        level_of = partial(gradient_level, step, is_quiet=self._regime.is_quiet(step))
        at_once = step.limit_ratio * (_EDGE_AT_ONCE if step.same_data else _AT_ONCE)
        if step.index > 0 and not step.fresh:  # of a probe StabilityMargin speaks
            judged.append(_found(now, at_once, "measured once", "critical"))
        mean, count = self._recent.mean(step.index, step.rate, steps=_LONG_SPAN)
        if mean is not None and count >= _ENOUGH and step.index >= _WARM_UP:
            shown = f"mean of {count} measurements in {_LONG_SPAN} steps"
            judged.append(_found(mean, level_of(), shown))
        if step.adaptive or step.same_data:
            return judged
        if step.index in _YOUNG:
            judged.append(_found(now, level_of(_FIRST), "measured once", "critical"))
        mean, count = self._recent.mean(step.index, step.rate, steps=_SHORT_SPAN, most=_THREE)
        if mean is not None and count >= _THREE and step.index >= _YOUNG.start:
            judged.append(_found(mean, level_of(_SHORT), "mean of the last three measurements"))
        return judged

    def _alert(self, step: Observation, found: _Found) -> Alert:
        lr = max(step.lr)
        is_quiet = self._regime.is_quiet(step)
        factor = rate_factor(step, gradient=found.value, is_quiet=is_quiet)
        agreeing = " that agree on the curvature" if is_quiet else ""
        batch = f"batches of {items_of(step)}{agreeing}"
        batch = "full-batch training" if step.same_data else batch
        text = (
            f"at a learning rate of {lr:.3g} the curvature along the steps is more than {batch} "
            f"survive for long with {step.optimizer}: {found.value:.3g} x the limit of small "
            f"batches, {found.shown} (alert above {found.level:.3g}; the full batch would allow "
            f"{step.limit_ratio:.3g}). {lower_rate(step, factor)}, or end its warm-up there."
        )
        return alert(
            self.name, found.severity, text, value=found.value, limit=found.level, step=step.index
        )


def _found(value: float, level: float, shown: str, severity: Severity = "warning") -> _Found:
    return _Found(value / level, value, level, shown, severity)
