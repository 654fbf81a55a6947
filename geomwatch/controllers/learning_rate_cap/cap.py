"""Keeps the learning rate below what the curvature along the gradient allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from geomwatch.controllers.actuators import LR
from geomwatch.controllers.learning_rate_cap import words
from geomwatch.controllers.learning_rate_cap.history import (
    BaseRate,
    BaseRateTest,
    Setback,
    Stall,
    StallTest,
)
from geomwatch.controllers.learning_rate_cap.limit import CapLimits, Limit
from geomwatch.controllers.learning_rate_cap.start import Start
from geomwatch.controllers.protocol import Knobs, Move, abstained
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import (
    GUESS,
    Documented,
    above,
    between,
    group,
    level,
    option,
    whole,
)
from geomwatch.observation.margins import SmoothedMargin, growth
from geomwatch.observation.step import Observation
from geomwatch.records import Alert

_LONG = 10  # steps: the interval of sentinels near the limit; a longer gap releases no more
_SAME = 1e-9  # relative: caps that differ by less are one


@dataclass(kw_only=True, eq=False, repr=False)
class LearningRateCap(Documented, Resumable):
    """Caps the rate where the small-batch gradient margin would exceed `c_bs`.

    With m_s = eta |BS| / (2(1-mu)) for SGD with momentum, eta |BS_P| / 2 for Adam (its bias
    correction included) and so on, the margin of the user's rate eta,

        eta_applied = max(min_scale eta, min(eta, c_bs eta / mean(m_s))):

    eta |BS| stays at `c_bs` times what is stable where the noise of small batches dominates
    (Andreyev et al. 2026), by default at what keeps the mean square within its own limit, as far as
    probes of micro-batches can tell (see `Limit`). The absolute value, because BS is negative early
    on in nets with BatchNorm. Where every step sees the same data its share of the full-batch limit
    counts, which momentum makes larger. The mean is exponential, weight `smoothing` on what was
    known before. A lower cap holds at once (after `patience` steps above it), a higher one is
    approached by at most `release` in five steps, and not within `cooldown` steps of a lower one.

    The margin of the full batch stays below `c_lambda`, and no limit is beyond that of full ones,
    whatever the momentum. At a start, which lasts until the loss has fallen, that margin and the
    noise of batches have limits of their own, unless `c_bs` is given: they show before any
    curvature along the gradient does (see `Start`).

    A rate just below the limit is stable, but where it stays there the noise of batches keeps the
    loss up, as any rate that is never lowered does. While the user's rate is high and the loss has
    stopped falling (see `StallTest`), at most once in 150 steps, or there is a critical alert that
    it has risen, the limit is lowered by `factor`; it is not raised again. The rate itself goes up
    only while the loss goes down, and after a critical alert of any kind not before the loss is
    back where it was (see `Setback`).

    Evaluated again before every step, at the rate the user's schedule has for it. Measurements that
    failed or are not finite change nothing, and while looks fail no schedule takes the rate up. It
    abstains, and says so, where the optimizer has no stability formula, or finds its rate itself as
    Prodigy does.

    Raises:
        UsageError: a number outside its range.
    """

    knob: ClassVar[str] = LR

    c_bs: float | None = level(
        None, "gradient margin to stay below; by default that of `limits`", source="decision 019"
    )
    c_lambda: float = level(
        1.0, "limit of M and its error, where steps see different data", source="theory"
    )
    smoothing: float = level(
        0.8,
        "weight of the past in the mean of margins, and of losses",
        source="decision 013",
        check=between(0, 1),
    )
    release: float = level(
        1.25, "largest rise of the cap in five steps", source="decision 013", check=above(1)
    )
    factor: float = level(
        0.25,
        "what is left of the limit once the loss has stopped falling, or blown up",
        source="decision 016",
        check=between(0, 1, last=True),
    )
    min_scale: float = level(
        1e-3, "smallest factor that the rate is multiplied by", source=GUESS, check=between(0, 1)
    )
    patience: int = level(
        0, "steps above the limit before the rate goes down", source=GUESS, check=whole(0)
    )
    cooldown: int = level(
        0, "steps after going down before the rate may go up", source=GUESS, check=whole(0)
    )
    limits: CapLimits = group(CapLimits, "what the margins have to stay below without `c_bs`")
    stall: StallTest = group(StallTest, "when the loss counts as one that has stopped falling")
    base_rate: BaseRateTest = group(BaseRateTest, "when your own rate is said to be too high")
    dry_run: bool = option(False, "log what would be done, and do nothing")

    _along: Kept[SmoothedMargin] = field(init=False)
    _top: Kept[SmoothedMargin] = field(init=False)
    _limit: Kept[Limit] = field(init=False)
    _start: Kept[Start] = field(init=False)
    _stall: Kept[Stall] = field(init=False)
    _setback: Kept[Setback] = field(init=False)
    _base_rate: Kept[BaseRate] = field(init=False)
    _settled: Kept[float] = field(init=False, default=1.0)  # what the loss has left of the limit
    _unit: Kept[float] = field(init=False, default=1.0)  # of the limit, over that of small batches
    _scale: Kept[float] = field(init=False, default=math.inf)  # the cap over these rates:
    _reference: Kept[tuple[float, ...]] = field(init=False, default=())
    _sent: Kept[float] = field(init=False, default=math.inf)  # the cap last asked for
    _taken: Kept[float] = field(init=False, default=math.inf)  # the rate that a step was left last
    _advised: Kept[float] = field(init=False, default=math.inf)  # the lowest rate
    _binds: Kept[bool] = field(init=False, default=False)
    # Steps: the last trusted measurement, the last way down, since when the rate is too high.
    _measured: Kept[int | None] = field(init=False, default=None)
    _lowered: Kept[int | None] = field(init=False, default=None)
    _above: Kept[int | None] = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._along = SmoothedMargin(self.smoothing)
        self._top = SmoothedMargin(0.0)  # the last one
        self._limit, self._start = Limit(self.limits), Start(self.limits)
        self._stall, self._setback = Stall(self.stall), Setback(self.smoothing)
        self._base_rate = BaseRate(self.base_rate)

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Set the cap for one step."""
        self._heed(alerts)
        self._limit.update(step)
        self._start.update(step)
        fresh = self._measure(step)
        self._recognise_full_batch(step)
        loss = None if step.settled is None else step.settled.loss
        blown_up = self._setback(loss, alerts)
        largest = max(step.lr, default=0.0)
        reason = self._cannot(step)
        if reason:
            return abstained(LR, reason)
        if not largest > 0 or not (self._along.known or self._top.known):
            return ()
        self._settle(step, loss, blown_up=blown_up)
        scale = self._approach(step, fresh)
        cap = max(scale, self.min_scale) * largest
        cap = min(cap, self._taken) if step.unseen else cap
        cap = min(cap, max(self._advised, self.min_scale * largest))
        self._taken = min(cap, largest)
        moves = list(self._base_rate(scale, largest)) if fresh else []
        binds, bound = cap < largest, self._binds
        self._binds = binds
        if binds != bound or not math.isclose(cap, self._sent, rel_tol=_SAME):
            self._sent = cap
            moves.append(Move(LR, cap, self._reason(step, cap)))
        return moves

    def _heed(self, alerts: Sequence[Alert]) -> None:
        """Go nowhere above the lowest rate that a critical alert has advised."""
        rates = [a.advised_lr for a in alerts if a.severity == "critical" and a.advised_lr]
        self._advised = min([self._advised, *rates])

    def _cannot(self, step: Observation) -> str:
        """Return why there is nothing to go by in this run; "" where there is, or may yet be."""
        if step.sets_rate:
            return f"{step.optimizer} finds its learning rate itself"
        if step.margin is not None and step.margin.status in ("unknown", "directional"):
            return step.margin.reason
        known = self._along.known or self._top.known
        return "" if known or not step.unseen else f"nothing was measured yet: {step.unseen}"

    def _measure(self, step: Observation) -> bool:
        """Take in what was measured at this step; tell whether there is something new."""
        along = step.gradient_fresh and self._along.update(step.gradient_margin, step.lr)
        return (step.fresh and self._top.update(step.margin, step.lr, with_error=True)) or along

    def _recognise_full_batch(self, step: Observation) -> None:
        """Take over the limit of full batches where every step has turned out to see the same."""
        if step.fresh:  # else it is what a run that was resumed does not know yet
            unit = step.limit_ratio if step.same_data else 1.0
            if unit > self._unit:  # what was capped before was capped by mistake
                self._scale = math.inf
            self._unit = unit

    def _settle(self, step: Observation, loss: float | None, *, blown_up: bool) -> None:
        """Lower the limit where the rate is high and the loss does not fall, or has blown up."""
        if loss is None or step.same_data or self.factor == 1:
            return
        margin = self._along.at(step.lr) * step.cold_start
        is_high = margin > self.stall.over * self._usual_bound(step)
        if is_high and (self._stall(loss) or blown_up):
            self._settled *= self.factor
            self._stall.restart()

    def _approach(self, step: Observation, fresh: bool) -> float:
        """Return the cap as a factor of the present rates.

        Lowered at once; raised at a measurement, by no more than the steps since the last allow.
        """
        now, target = step.index, self._target(step)
        grown = growth(step.lr, self._reference)
        may_rise = fresh and self._setback.allows_more() and not self._rests(now)
        before = self._scale / grown if grown > 0 else math.inf  # of groups that were not stepped
        after = before
        if target >= 1:
            self._above = None
        elif self._above is None:
            self._above = now
        if target < before:
            if self._above is None or now - self._above >= self.patience:
                after, self._lowered = target, now
        elif may_rise:
            gap = 0 if self._measured is None else min(now - self._measured, _LONG)
            after = min(target, before * (self.release ** (1 / 5)) ** gap)
        if fresh:
            self._measured = now
        if fresh or after != before:
            self._scale, self._reference = after, step.lr
        return after

    def _rests(self, now: int) -> bool:
        return self._lowered is not None and now - self._lowered < self.cooldown

    def _target(self, step: Observation) -> float:
        """Return the factor of the present rates at which all margins are within their limits."""
        shares = (self._along_share(step), self._top_share(step))
        return min(
            self._start_allows(step), *(1 / share for share in shares if share > 0), math.inf
        )

    def _along_share(self, step: Observation) -> float:
        """Return the gradient margin of the user's rates, over its limit."""
        return self._along.at(step.lr) * step.cold_start / self._bound(step)

    def _top_share(self, step: Observation) -> float:
        """Return that of the top eigenvalue, over its own; a cold start is over before it grows."""
        return 0.0 if step.same_data else self._top.at(step.lr) / self.c_lambda

    def _start_allows(self, step: Observation) -> float:
        return math.inf if self.c_bs is not None else self._start.allows(step)

    def _bound(self, step: Observation) -> float:
        """Return what the gradient margin has to stay below."""
        return self._usual_bound(step) * self._settled

    def _usual_bound(self, step: Observation) -> float:
        if self.c_bs is not None:
            return self.c_bs * self._unit
        return self._limit.at(step) if self._unit == 1 else self.limits.full_batch * self._unit

    def _reason(self, step: Observation, cap: float) -> str:
        shares = {
            "curvature along the gradient": (self._along_share(step), self._bound(step)),
            "λ_max": (self._top_share(step), self.c_lambda),
        }
        return words.held(
            step,
            cap,
            at_start=self._start_allows(step),
            shares=shares,
            settled=self._settled,
            is_setback=self._setback.lasts,
        )
