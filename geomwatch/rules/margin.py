"""The learning rate is near, or beyond, what the curvature allows."""

from __future__ import annotations

import math
import statistics
from collections import deque

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.regime import Regime
from geomwatch.observation.step import Observation
from geomwatch.observation.trust import Trust
from geomwatch.records import Alert, Severity
from geomwatch.rules.margin_message import Levels, Usual, Verdict, beyond_usual, described
from geomwatch.rules.rule import Latch, Persistence

# Mini-batch training turns unstable well below 1, since noise adds to the curvature; full-batch
# training lives at 1 (the edge of stability) and survives 2.75 at the start. `geomwatch explain
# stability_margin` has the runs behind the numbers.
_NOISY = Levels(warning=0.8, critical=1.0, at_once=2.5)
_FULL_BATCH = Levels(warning=1.3, critical=2.0, at_once=3.0)
_BEFORE_START = 10.0  # at step 0, where a catapult out of sharp weights is still harmless
_RELEASE = 0.7  # of the warning level
_RELATIVE = 2.0  # times the run's own median, where no limit is known,
_RELATIVE_LOSS = 1.5  # while the loss is this many times its median
_ENOUGH = 5  # measurements for such a median
_PROBES = 3  # averaged, if they are recent:
_RECENT = 60  # steps
_WARM_UP = 10  # steps without warnings; critical alerts are possible from the first


class StabilityMargin(Resumable):
    """Warns when lr * curvature comes near the limit of the optimizer.

    M = lambda_max(S (H + W) S) < 1 is linear stability (see `stability`). One batch differs from
    the next by more than a probe errs, so the rule judges the geometric mean of the last three
    measurements, re-scaled to the present learning rate. Critical needs that mean above its level
    for `persistence` steps, or one measurement beyond a higher level. Where every step sees the
    same data, levels are those of the edge of stability and the loss must rise too. For optimizers
    without a formula lr * lambda_max must stay above 2 x the median of the run's last 20
    measurements, and the loss above 1.5 x its own, for `persistence` steps: curvature alone also
    grows in a healthy run, up to eightfold, while the loss falls. A margin that can't be believed
    (see `trust`) is passed over.
    """

    name = "stability_margin"

    _persistent: Kept[Persistence]
    _lasting: Kept[Persistence]
    _latch: Kept[Latch]
    _regime: Kept[Regime]
    _trust: Kept[Trust]
    _recent: Kept[RecentMargins]
    _history: Kept[deque[tuple[float, float]]]
    _loss_before: Kept[float | None]

    def __init__(self, *, persistence: int = 5) -> None:
        self._persistent = Persistence(persistence)
        self._lasting = Persistence(persistence)  # the same for warnings
        self._latch = Latch()
        self._regime = Regime()
        self._trust = Trust()
        self._recent = RecentMargins(_PROBES)
        self._history = deque(maxlen=20)  # lr * lambda_max, loss
        self._loss_before = None

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the margin of one step; only a fresh measurement can raise an alert."""
        self._regime(step)
        doubt = self._trust(step)
        if doubt or not step.fresh or step.margin is None or step.margin.value is None:
            return None
        if step.margin.status != "ok":
            return self._relative(step, step.margin.value)
        levels = _FULL_BATCH if step.same_data else _NOISY
        self._recent.add(step.index, step.rate, step.margin.value)
        mean, count = self._recent.mean(step.index, step.rate, steps=_RECENT)
        if mean is None:  # at a rate of 0
            mean, count = step.margin.value, 1
        severity = self._severity(step, mean, count, levels)
        if severity is None:
            if mean < _RELEASE * levels.warning:
                self._latch.calm(step.index)
            else:
                self._latch.between()
            return None
        if not self._latch.admit(severity, step.index):
            return None
        return self._alert(step, severity, mean, count, levels)

    def _alert(
        self, step: Observation, severity: Severity, mean: float, count: int, levels: Levels
    ) -> Alert:
        assert step.margin is not None
        assert step.margin.value is not None
        level = levels.critical if severity == "critical" else levels.warning
        single = step.index == 0 or (severity == "critical" and step.margin.value > levels.at_once)
        if single:
            level = levels.at_once if step.index else _BEFORE_START
        found = Verdict(
            severity,
            mean,
            count,
            single=single,
            level=level,
            noise=self._regime.noise(step),
            is_quiet=self._regime.is_quiet(step),
        )
        return described(self.name, step, found)

    def _severity(
        self, step: Observation, mean: float, count: int, levels: Levels
    ) -> Severity | None:
        assert step.margin is not None
        assert step.margin.value is not None
        persistent = self._persistent(mean > levels.critical and step.index > 0, step.index)
        # Two recent measurements above the level, or two that lie further apart.
        lasting = self._lasting(mean > levels.warning, step.index) or count >= 2
        trouble = self._loss_rises(step) or not step.same_data
        if step.index == 0:
            return "critical" if step.margin.value > _BEFORE_START else None
        # Full-batch training leaves sharp weights by a catapult, with a passing rise of the loss.
        spared = step.same_data and step.index < _WARM_UP
        if step.margin.value > levels.at_once or (persistent and trouble and not spared):
            return "critical"
        if mean > levels.warning and lasting and step.index >= _WARM_UP and trouble:
            return "warning"
        if self._regime.is_edge(step, mean, below=levels.warning):
            return "info"
        return None

    def _loss_rises(self, step: Observation) -> bool:
        before, now = self._loss_before, step.loss
        self._loss_before = now if now is not None else before
        return before is None or now is None or now > before

    def _relative(self, step: Observation, margin: float) -> Alert | None:
        if step.loss is None:
            return None
        usual, usual_loss = self._usual()
        self._history.append((margin, step.loss))
        loss_limit = usual_loss + (_RELATIVE_LOSS - 1) * abs(usual_loss)
        present = margin > _RELATIVE * usual > 0 and step.loss > loss_limit
        if not self._persistent(present, step.index):
            if not present:
                self._latch.calm(step.index)
            return None
        if not self._latch.admit("warning", step.index):
            return None
        usual_run = Usual(usual, usual_loss, _RELATIVE, loss_limit)
        return beyond_usual(self.name, step, margin, usual_run)

    def _usual(self) -> tuple[float, float]:
        """Return the medians of lr * lambda_max and of the loss; infinite while they are young."""
        if len(self._history) < _ENOUGH:
            return math.inf, math.inf
        margins, losses = zip(*self._history, strict=True)
        return statistics.median(margins), statistics.median(losses)
