"""Keeps the learning rate below what the curvature along the gradient allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from geomwatch.controllers.actuators import LR
from geomwatch.controllers.learning_rate_cap.base_rate import BaseRate
from geomwatch.controllers.learning_rate_cap.first_steps import FirstSteps
from geomwatch.controllers.learning_rate_cap.limit import Limit
from geomwatch.controllers.learning_rate_cap.stall import Stall
from geomwatch.controllers.protocol import Knobs, Move, check_above, check_share
from geomwatch.curvature.checks import check_count
from geomwatch.observation.margins import SmoothedMargin, growth
from geomwatch.records import Alert
from geomwatch.rules import Observation

_FULL_BATCH = 2.0  # of the limit that full batches have
_LONG = 50  # steps: a longer gap between measurements releases no more than this one
_HIGH = 0.5  # of its limit: a margin from which on noise may be all that keeps the loss up
_SAME = 1e-9  # relative: caps that differ by less are one


class LearningRateCap:
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

    In the first 20 steps the margin of the full batch and the noise of batches have limits of their
    own, unless `c_bs` is given: they show before any curvature along the gradient does (see
    `FirstSteps`).

    A rate just below the limit is stable, but where it stays there the noise of batches keeps the
    loss up, as any rate that is never lowered does. While the user's rate is above half the limit
    and the loss has stopped falling (`Stall`), the limit is lowered by `factor`, at most once in
    150 steps; it is not raised again.

    Evaluated again before every step, at the rate the user's schedule has for it. Measurements that
    failed or are not finite change nothing.

    Args:
        c_bs: the gradient margin to stay below; by default between 1 and 2 as
            micro-batches have it, 5 where they agree; without them 2 for SGD, 1 for methods that
            adapt their steps to gradients, as Adam (docs/decisions/013 and 019).
        c_lambda: if given, the margin (lambda_max and its error) to stay below too; 0.5, say.
        smoothing: weight of the past in the mean of margins.
        release: largest factor by which the cap rises in five steps.
        factor: by which the limit is lowered where the loss has stopped falling; 1 leaves it.
        min_scale: the rate is never lowered by more than this factor.
        patience: optimizer steps that a margin must lie above its limit before the rate goes down.
        cooldown: optimizer steps after the rate went down before it may rise again.

    Raises:
        UsageError: a number outside its range.
    """

    knob = LR

    def __init__(
        self,
        *,
        c_bs: float | None = None,
        c_lambda: float | None = None,
        smoothing: float = 0.8,
        release: float = 1.25,
        factor: float = 0.25,
        min_scale: float = 1e-3,
        patience: int = 0,
        cooldown: int = 0,
    ) -> None:
        for name, given in (("c_bs", c_bs), ("c_lambda", c_lambda)):
            if given is not None:
                check_above(name, given, 0)
        check_share("smoothing", smoothing)
        check_above("release", release, 1)
        if factor != 1:
            check_share("factor", factor)
        check_share("min_scale", min_scale)
        check_count("patience", patience, 0)
        check_count("cooldown", cooldown, 0)
        self._c_bs, self._c_lambda = c_bs, c_lambda
        self._release, self._min_scale = release ** (1 / 5), min_scale
        self._patience, self._cooldown = patience, cooldown
        self._along = SmoothedMargin(smoothing)
        self._top = SmoothedMargin(0.0)  # the last one
        self._limit_along, self._first_steps = Limit(), FirstSteps()
        self._decay, self._stall = factor, Stall()
        self._settled = 1.0  # what the loss has lowered the limit to, of the usual one
        self._unit = 1.0  # small-batch limits that the limit of this run is
        self._factor = math.inf  # the cap, of these rates:
        self._reference: tuple[float, ...] = ()
        self._sent = math.inf  # what was last asked for, the floor included
        self._measured: int | None = None  # the step of the last trusted measurement
        self._lowered = -math.inf  # the step at which it last went down
        self._above: int | None = None  # the step since which the target is below the rate
        self._binds = False
        self._base_rate = BaseRate()

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Set the cap for one step."""
        self._limit_along.update(step)
        self._first_steps.update(step)
        fresh = self._measure(step)
        self._recognise_full_batch(step)
        largest = max(step.lr, default=0.0)
        if not largest > 0 or not (self._along.known or self._top.known):
            return ()
        self._settle(step)
        scale = self._approach(step, fresh)
        cap = max(scale, self._min_scale) * largest
        moves = list(self._base_rate(scale, largest)) if fresh else []
        binds, bound = cap < largest, self._binds
        self._binds = binds
        if binds != bound or not math.isclose(cap, self._sent, rel_tol=_SAME):
            self._sent = cap
            moves.append(Move(LR, cap, self._reason(step, cap)))
        return moves

    def _measure(self, step: Observation) -> bool:
        """Take in what was measured at this step; tell whether there is something new."""
        along = step.gradient_fresh and self._along.update(step.gradient_margin, step.lr)
        top = self._c_lambda is not None and step.fresh
        top = top and self._top.update(step.margin, step.lr, with_error=True)
        return along or top

    def _recognise_full_batch(self, step: Observation) -> None:
        """Take over the limit of full batches where every step has turned out to see the same."""
        if step.fresh:  # else it is what a run that was resumed does not know yet
            unit = step.limit_ratio if step.same_data else 1.0
            if unit > self._unit:  # what was capped before was capped by mistake
                self._factor = math.inf
            self._unit = unit

    def _settle(self, step: Observation) -> None:
        """Lower the limit where the rate is high and the loss does not fall."""
        loss = None if step.settled is None else step.settled.loss
        if loss is None or step.same_data or self._decay == 1:
            return
        margin = self._along.at(step.lr) * step.cold_start
        if margin > _HIGH * self._usual_limit(step) and self._stall(loss):
            self._settled *= self._decay
            self._stall.restart()

    def _approach(self, step: Observation, fresh: bool) -> float:
        """Return the cap as a factor of the present rates.

        Lowered at once; raised at a measurement, by no more than the steps since the last allow.
        """
        now, target = step.index, self._target(step)
        grown = growth(step.lr, self._reference)
        before = self._factor / grown if grown > 0 else math.inf  # of groups that were not stepped
        after = before
        if target >= 1:
            self._above = None
        elif self._above is None:
            self._above = now
        if target < before:
            if self._above is None or now - self._above >= self._patience:
                after, self._lowered = target, now
        elif fresh and now - self._lowered >= self._cooldown:
            gap = 0 if self._measured is None else min(now - self._measured, _LONG)
            after = min(target, before * self._release**gap)
        if fresh:
            self._measured = now
        if fresh or after != before:
            self._factor, self._reference = after, step.lr
        return after

    def _target(self, step: Observation) -> float:
        """Return the factor of the present rates at which all margins are within their limits."""
        limits = ((self._along, self._limit(step)), (self._top, self._c_lambda))
        allowed = self._noise_allows(step)
        for margin, limit in limits:
            value = margin.at(step.lr) * step.cold_start
            if limit is not None and value > 0:
                allowed = min(allowed, limit / value)
        return allowed

    def _noise_allows(self, step: Observation) -> float:
        return math.inf if self._c_bs is not None else self._first_steps.allows(step)

    def _limit(self, step: Observation) -> float:
        """Return what the gradient margin has to stay below."""
        return self._usual_limit(step) * self._settled

    def _usual_limit(self, step: Observation) -> float:
        if self._c_bs is not None:
            return self._c_bs * self._unit
        return self._limit_along.at(step) if self._unit == 1 else _FULL_BATCH * self._unit

    def _reason(self, step: Observation, cap: float) -> str:
        largest = max(step.lr)
        if cap >= largest:
            return f"the learning rate {largest:.3g} is within what the curvature allows"
        if cap > 0.99 * self._noise_allows(step) * largest:
            return (
                f"learning rate {largest:.3g} held at {cap:.3g}: in the first steps curvature, and "
                "how much batches disagree on it, has to be far below its limit"
            )
        along, top = (m.at(step.lr) * step.cold_start for m in (self._along, self._top))
        limit = self._limit(step)
        if self._c_lambda is not None and top / self._c_lambda > along / limit:
            along, limit, what = top, self._c_lambda, "λ_max"
        else:
            what = "curvature along the gradient"
        bound = f"to stay below {limit:.3g}"
        if self._settled < 1:
            bound = f"{bound}, {1 / self._settled:.3g} x lower since the loss stopped falling"
        if along * cap < 0.99 * limit * largest:
            bound = f"{bound}, approached in small steps"
        return (
            f"learning rate {largest:.3g} held at {cap:.3g}: times {what} it is {along:.3g} of "
            f"what is stable ({bound})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the smoothed margins and the cap."""
        return {
            "along": self._along.state_dict(),
            "top": self._top.state_dict(),
            "limit_along": self._limit_along.state_dict(),
            "first_steps": self._first_steps.state_dict(),
            "settled": self._settled,
            "stall": self._stall.state_dict(),
            "unit": self._unit,
            "factor": _finite(self._factor),
            "sent": _finite(self._sent),
            "reference": list(self._reference),
            "measured": self._measured,
            "lowered": _finite(self._lowered),
            "above": self._above,
            "binds": self._binds,
            "base_rate": self._base_rate.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the smoothed margins and the cap."""
        self._along.load_state_dict(state["along"])
        self._top.load_state_dict(state["top"])
        self._settled, self._unit = state["settled"], state["unit"]
        self._limit_along.load_state_dict(state["limit_along"])
        self._first_steps.load_state_dict(state["first_steps"])
        self._stall.load_state_dict(state["stall"])
        self._factor = math.inf if state["factor"] is None else state["factor"]
        self._sent = math.inf if state["sent"] is None else state["sent"]
        self._reference = tuple(state["reference"])
        self._measured, self._above = state["measured"], state["above"]
        self._lowered = -math.inf if state["lowered"] is None else state["lowered"]
        self._binds = state["binds"]
        self._base_rate.load_state_dict(state["base_rate"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
