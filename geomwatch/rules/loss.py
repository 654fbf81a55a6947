"""The loss has risen well above the lowest it has been."""

from __future__ import annotations

import math
import statistics
from collections import deque

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import lower_rate, rate_factor_of_loss
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Latch

_SMOOTHING = 0.8
_NOISE_SMOOTHING = 0.98
_SHARE = 0.3  # of the first loss: 0.7 nats of the 2.3 that ten classes start from
_NOISE = 3.0  # standard deviations of a single loss
_YOUNG = 10  # losses until the noise is known
_IN_A_ROW = 3  # losses: a single bad batch of few items lifts a healthy run's mean above the limit
_START, _START_LAST = 10, 5  # losses of a start, and the last of them, when a spike has healed that
_START_RISE = 0.05  # adaptive methods and BatchNorm often begin with: still above the first by this
_START_SPIKE = 0.4  # and a single one above the first by this
_START_HEALED = 5  # losses, after which such a spike has healed if it does
_START_MARGIN = 0.6  # the stability margin that makes the rate a likely reason,
_START_FULL_BATCH = 3.0  # and in full-batch training, which survives a catapult
_START_ITEMS = 16  # of fewer items a single loss, the first, says little
_ADVICE_SPAN = 60  # steps whose margins the advice goes by


class LossRise(Resumable):
    """Warns when the smoothed loss rises above its running minimum.

    EMA(loss) - min EMA > max(0.3 |first loss|, 3 sd of a single loss), and the last three losses
    as well; critical at once when the EMA exceeds the first loss by the same amount. Warns as well
    when the first ten steps, near the limit, teach nothing: one of the last five of their losses is
    40 % above the first, or their median 5 %, in batches of 16 items or more, and a stability
    margin has been above 0.6 (3 where every step sees the same data). Curvature does not announce
    every failure (bad data, for one); this is the rule beside it. The rate it advises is that of
    the margins of the last 60 steps, but a tenth at most.
    """

    name = "loss_rise"

    _first: Kept[float | None]
    _last: Kept[deque[float]]
    _count: Kept[int]
    _margin: Kept[float]
    _mean: Kept[float]
    _variance: Kept[float]
    _lowest: Kept[float | None]
    _along: Kept[RecentMargins]
    _latch: Kept[Latch]

    def __init__(self) -> None:
        self._first = None
        self._last = deque(maxlen=_START_LAST)
        self._count = 0
        self._margin = 0.0  # the largest of the start
        self._mean = 0.0  # EMA without bias correction
        self._variance = 0.0
        self._lowest = None
        self._along = RecentMargins(_ADVICE_SPAN)
        self._latch = Latch()

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the loss of the step before, or of a probe when the loop passes no losses."""
        self._remember(step)
        loss, index = self._loss_of(step)
        if loss is None or not math.isfinite(loss):
            return None
        smooth = self._update(loss)
        assert self._first is not None
        limit = max(_SHARE * abs(self._first), _NOISE * math.sqrt(self._noise()))
        if self._count <= _START:
            stuck = self._judge_start(step, index)
            if stuck is not None:
                return stuck
        if self._lowest is None:
            return None
        rise = smooth - self._lowest
        if rise <= limit:
            self._latch.calm(index) if rise < 0.5 * limit else self._latch.between()
            return None
        severity: Severity = "critical" if smooth > self._first + limit else "warning"
        recent = list(self._last)[-_IN_A_ROW:]
        if severity == "warning" and min(recent) <= self._lowest + limit:
            return None
        if not self._latch.admit(severity, index):
            return None
        limit += self._lowest
        message = (
            f"the loss has risen to {smooth:.4g} from its lowest {self._lowest:.4g} (limit "
            f"{limit:.4g}, first loss {self._first:.4g}). "
            f"{self._advised(step, is_lost=severity == 'critical')}, and look at the last batches."
        )
        return alert(self.name, severity, message, value=smooth, limit=limit, step=index)

    def _remember(self, step: Observation) -> None:
        along = step.gradient_margin
        if step.gradient_fresh and along is not None and along.value is not None:
            self._along.add(step.index, step.rate, along.value)

    def _advised(self, step: Observation, *, margin: float | None = None, is_lost: bool) -> str:
        gradient, _ = self._along.mean(step.index, step.rate, steps=_ADVICE_SPAN)
        factor = rate_factor_of_loss(step, margin=margin, gradient=gradient)
        return lower_rate(step, factor, is_lost=is_lost)

    def _judge_start(self, step: Observation, index: int) -> Alert | None:
        """Warn of first steps that teach nothing, where the rate is a likely reason."""
        # Without a formula for the optimizer it is no share of a limit.
        if step.margin is not None and step.margin.status == "ok":
            self._margin = max(self._margin, step.margin.value or 0.0)
        level = _START_FULL_BATCH if step.same_data else _START_MARGIN
        is_suspect = self._margin > level and step.items >= _START_ITEMS
        if not is_suspect:
            return None
        assert self._first is not None
        shown, loss, limit = "a loss", self._last[-1], self._first + _START_SPIKE * abs(self._first)
        if self._count <= _START_HEALED:
            return None
        if loss <= limit and self._count == _START:
            shown, loss = f"the median of the last {_START_LAST}", statistics.median(self._last)
            limit = self._first + _START_RISE * abs(self._first)
        if loss <= limit or not self._latch.admit("warning", index):
            return None
        message = (
            f"the first losses do not fall: {shown} is {loss:.4g}, the first was "
            f"{self._first:.4g} (limit {limit:.4g}), and the stability margin has been up to "
            f"{self._margin:.2g}. {self._advised(step, margin=self._margin, is_lost=True)}, or "
            "with a warm-up."
        )
        return alert(self.name, "warning", message, value=loss, limit=limit, step=index)

    def _loss_of(self, step: Observation) -> tuple[float | None, int]:
        if step.settled is not None and step.settled.loss is not None:
            return step.settled.loss, step.settled.step
        return step.loss, step.index

    def _update(self, loss: float) -> float:
        if self._first is None:
            self._first = loss
        self._count += 1
        self._mean = _SMOOTHING * self._mean + (1 - _SMOOTHING) * loss
        # Differences of successive losses, because a trend is no noise.
        deviation = abs(loss - self._last[-1]) / math.sqrt(2) if self._last else 0.0
        self._last.append(loss)
        if self._count > _YOUNG:  # a blow-up must not pass for noise: no step counts for much
            deviation = min(deviation, 3 * math.sqrt(self._noise()))
        self._variance *= _NOISE_SMOOTHING
        self._variance += (1 - _NOISE_SMOOTHING) * deviation * deviation
        smooth = self._mean / (1 - _SMOOTHING**self._count)
        if self._count >= 5:  # a minimum over fewer is the luck of one batch
            self._lowest = smooth if self._lowest is None else min(self._lowest, smooth)
        return smooth

    def _noise(self) -> float:
        """Return the variance of a single loss."""
        return self._variance / (1 - _NOISE_SMOOTHING ** max(self._count, 1))
