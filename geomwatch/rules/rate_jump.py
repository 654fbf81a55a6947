"""A learning rate that has just jumped, judged before the step that applies it."""

from __future__ import annotations

import math

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.margins import RecentMargins, growth
from geomwatch.observation.regime import Regime, noise_of
from geomwatch.observation.step import Observation
from geomwatch.observation.trust import Trust
from geomwatch.records import Alert
from geomwatch.rules.advice import advised_rate
from geomwatch.rules.message import alert, carried_by
from geomwatch.rules.rule import Latch

_JUMP = 2.0  # times the rate of the step before
_PROBES = 3  # averaged, of the last
_RECENT = 200  # steps
_ITEMS = 64  # the batch that the levels below are for
_SGD, _ADAPTIVE = 2.4, 5.0  # of the geometric mean of both margins
_FULL_BATCH = 2.2  # of the margin, where every step sees the same data,
_QUIET = 1.2  # of SGD where batch noise was measured and does not dominate,
_AT_ONCE = 2.0  # and at whatever noise
_MEAN_SQUARE, _MEAN_SQUARE_ADAPTIVE = 3.5, 6.0  # of the stochastic margin, where it was measured
_HELD = 2.0  # times higher, where this step was not measured
_TARGET = 0.5  # of the level, that the advice aims for


class RateJump(Resumable):
    """Critical when a rate at least doubles from one step to the next, to where runs do not live.

    A jump that is too high ruins a run within one or two steps, so that only a judgement before the
    step leads. Where batch noise dominates, or is not known, a batch of B items breaks between the
    limit of the full batch, M = 1, and that of single batches, G = 1 (the margin along the
    gradient). Where the probe of this step could measure micro-batches, their stochastic margin
    M_ms tells: levels are M_ms > 3.5 and M > 1.3 for SGD, 6 and 2 for methods that adapt. Else

        sqrt(M G) > 2.4 sqrt(B / 64)    for SGD,    5 sqrt(B / 64)    for methods that adapt,

    and M > 2; where noise is known not to dominate (see `regime`) M > 1.3 and M > 2 alone, and
    where every step sees the same data 2.2. M and G are geometric means of the last three
    measurements, at the new rate. Where no probe fell on the step, levels are twice those.
    """

    name = "rate_jump"

    _lr: Kept[tuple[float, ...]]
    _margins: Kept[RecentMargins]
    _gradients: Kept[RecentMargins]
    _items: Kept[int]
    _latch: Kept[Latch]
    _trust: Kept[Trust]
    _regime: Kept[Regime]

    def __init__(self) -> None:
        self._lr = ()
        self._margins = RecentMargins(_PROBES)
        self._gradients = RecentMargins(_PROBES)
        self._items = 0
        self._latch = Latch()
        self._trust = Trust()
        self._regime = Regime(holds=math.inf)  # jumps are what it is for

    def __call__(self, step: Observation) -> Alert | None:
        """Compare this step's rate with that of the step before."""
        self._items = step.items or self._items
        trusted = not self._trust(step)
        self._regime(step)
        if step.fresh and trusted and step.margin and step.margin.value is not None:
            self._margins.add(step.index, step.rate, step.margin.value)
        along = step.gradient_margin
        if step.gradient_fresh and trusted and along and along.value is not None:
            self._gradients.add(step.index, step.rate, along.value)
        before, self._lr = self._lr, step.lr
        jump = growth(step.lr, before)
        if jump < _JUMP:
            self._latch.calm(step.index)
            return None
        margin, _ = self._margins.mean(step.index, step.rate, steps=_RECENT)
        if margin is None or not trusted or step.margin is None or step.margin.status != "ok":
            return None
        share, reason = self._share(step, margin)
        if share <= 1 or not self._latch.admit("critical", step.index):
            return None
        return _alert(self.name, step, jump, share, reason)

    def _share(self, step: Observation, margin: float) -> tuple[float, str]:
        """Return what the new rate is of the one where runs break, and from what."""
        held = 1.0 if step.fresh else _HELD
        if step.same_data:
            # One measurement will do: there is no noise of batches to average.
            now = (step.margin.value if step.margin else None) or margin
            return _share_of(now, held * _FULL_BATCH)
        noise = noise_of(step.estimates or {}) if step.fresh else None
        if noise is not None and step.margin is not None and step.margin.value is not None:
            return _share_of_both(step, step.margin.value, noise)
        if self._regime.is_noisy(step) is False:
            return _share_of(margin, held * (_AT_ONCE if step.adaptive else _QUIET))
        along, _ = self._gradients.mean(step.index, step.rate, steps=_RECENT)
        gradient = max(along or 0.0, margin)
        both = math.sqrt(margin * gradient)
        level = _ADAPTIVE if step.adaptive else _SGD
        level *= held * math.sqrt(max(self._items, 1) / _ITEMS)
        if margin / (held * _AT_ONCE) > both / level:
            return _share_of(margin, held * _AT_ONCE)
        text = f"margin {margin:.2g} and {gradient:.2g} along the gradient, mean {both:.2g}"
        return both / level, f"{text}, alert above {level:.2g} at {self._items} items"


def _share_of(margin: float, level: float) -> tuple[float, str]:
    return margin / level, f"margin {margin:.2g}, alert above {level:.2g}"


def _share_of_both(step: Observation, margin: float, noise: float) -> tuple[float, str]:
    """Return the larger share of its level: of the stochastic margin, or the full batch's."""
    level = _MEAN_SQUARE_ADAPTIVE if step.adaptive else _MEAN_SQUARE
    share, text = _share_of(margin, _AT_ONCE if step.adaptive else _QUIET)
    if noise * margin / level > share:
        share, text = _share_of(noise * margin, level)
        return share, f"stochastic {text}, {noise:.2g} x that of the full batch"
    return share, text


def _alert(rule: str, step: Observation, jump: float, share: float, reason: str) -> Alert:
    lr = max(step.lr)
    measured = "measured at this step" if step.fresh else "from earlier probes, re-scaled"
    text = (
        f"the learning rate jumps {jump:.3g} x to {lr:.3g}, {share:.2g} x what {step.optimizer} is "
        f"likely to survive here: {reason} ({measured}){carried_by(step)}. This step is not taken "
        f"yet. Lower the learning rate to {advised_rate(step, _TARGET / share)}, or reach the new "
        "rate by a warm-up of some hundred steps."
    )
    return alert(
        rule, "critical", text, value=share, limit=1.0, step=step.index, layers=step.layers
    )
