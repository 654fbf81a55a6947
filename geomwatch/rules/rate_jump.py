"""A learning rate that has just jumped, judged before the step that applies it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.batch_noise import noise_ratio
from geomwatch.observation.documented import GUESS, Documented, above, between, group, level
from geomwatch.observation.gradient_level import ITEMS
from geomwatch.observation.margins import RecentMargins
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.advice import advised_rate
from geomwatch.rules.message import alert, carried_by
from geomwatch.rules.rule import LatchedRule


@dataclass(frozen=True, kw_only=True, repr=False)
class StochasticLevels(Documented):
    """Levels of the stochastic margin, where this step's probe could measure it."""

    sgd: float = level(3.5, "stochastic margin of SGD", source="decision 018, no table")
    adaptive: float = level(6.0, "the same of methods that adapt", source="decision 018, no table")


@dataclass(kw_only=True, eq=False, repr=False)
class RateJump(LatchedRule):
    """Critical when a rate at least doubles from one step to the next, to where runs do not live.

    A jump that is too high ruins a run within one or two steps, so that only a judgement before the
    step leads. Where batch noise dominates, or is not known, a batch of B items breaks between the
    limit of the full batch, M = 1, and that of single batches, G = 1 (the gradient margin). Where
    the probe of this step could measure micro-batches, their stochastic margin M_ms tells: above
    its level in `stochastic`, or M above `quiet` (`beyond` for methods that adapt). Else

        sqrt(M G) > sgd sqrt(B / 64)    for SGD,    adaptive sqrt(B / 64)    for methods that adapt,

    and M > `beyond`; where noise is known not to dominate (see `Observer`) M > `quiet` and M >
    `beyond` alone, and where every step sees the same data `full_batch`. M and G are geometric
    means of the last `probes` measurements, at the new rate. Where no probe fell on the step,
    levels are `held` times those.
    """

    name = "rate_jump"
    reads = "rise"
    says = ("critical",)

    jump: float = level(2.0, "times the rate of the step before", source=GUESS, check=above(1))
    sgd: float = level(2.4, "root of M G, of SGD and 64 items", source="decision 012")
    adaptive: float = level(5.0, "the same of methods that adapt", source="decision 012")
    stochastic: StochasticLevels = group(StochasticLevels, "of the stochastic margin")
    quiet: float = level(1.2, "margin of SGD where noise does not dominate", source="decision 012")
    beyond: float = level(2.0, "margin at whatever noise", source=GUESS)
    full_batch: float = level(2.2, "margin in full-batch training", source="decision 012")
    held: float = level(2.0, "times higher levels at a step without a probe", source=GUESS)
    target: float = level(0.5, "share of the level aimed for", source=GUESS, check=between(0, 1))
    probes: int = level(3, "measurements in a mean, at most", source="decision 012")
    span: int = level(200, "steps that a mean looks back", source=GUESS)

    waits: Kept[bool] = field(init=False, default=False)  # counts the calm steps after an alert
    _margins: Kept[RecentMargins] = field(init=False)
    _gradients: Kept[RecentMargins] = field(init=False)
    _items: Kept[int] = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._margins, self._gradients = (RecentMargins(self.probes) for _ in range(2))

    def __call__(self, step: Observation) -> Alert | None:
        """Compare this step's rate with that of the step before."""
        self._items = step.items or self._items
        if not step.doubt:
            for recent, now in (
                (self._margins, step.margin_now),
                (self._gradients, step.gradient_margin_now),
            ):
                if now is not None:
                    recent.add(step.index, step.rate, now)
        if step.jump < self.jump:
            self._latch.calm(step.index)
            self.waits = self._latch.severity != ""
            return None
        margin = self._mean(self._margins, step)
        if margin is None or step.doubt or step.margin is None or not step.has_limit:
            return None
        share, reason = self._share(step, margin)
        if share <= 1 or not self._latch.admit("critical", step.index):
            return None
        self.waits = True
        return self._alert(step, share, reason)

    def _mean(self, recent: RecentMargins, step: Observation) -> float | None:
        return recent.mean(step.index, step.rate, steps=self.span)[0]

    def _share(self, step: Observation, margin: float) -> tuple[float, str]:
        """Return what the new rate is of the one where runs break, and from what."""
        held = 1.0 if step.fresh else self.held
        now = None if step.margin is None else step.margin.value
        if step.same_data:
            # One measurement will do: there is no noise of batches to average.
            return _share_of(now or margin, held * self.full_batch)
        noise = noise_ratio(step.estimates or {})
        if noise is not None and now is not None:
            return self._share_of_both(step, now, noise)
        if step.is_noisy is False:
            return _share_of(margin, held * (self.beyond if step.adaptive else self.quiet))
        gradient = max(self._mean(self._gradients, step) or 0.0, margin)
        both = math.sqrt(margin * gradient)
        level = self.adaptive if step.adaptive else self.sgd
        level *= held * math.sqrt(max(self._items, 1) / ITEMS)
        if margin / (held * self.beyond) > both / level:
            return _share_of(margin, held * self.beyond)
        text = f"margin {margin:.2g} and {gradient:.2g} along the gradient, mean {both:.2g}"
        return both / level, f"{text}, alert above {level:.2g} at {self._items} items"

    def _share_of_both(self, step: Observation, margin: float, noise: float) -> tuple[float, str]:
        """Return the larger share of its level: of the stochastic margin, or the full batch's."""
        level = self.stochastic.adaptive if step.adaptive else self.stochastic.sgd
        share, text = _share_of(margin, self.beyond if step.adaptive else self.quiet)
        if noise * margin / level > share:
            share, text = _share_of(noise * margin, level)
            return share, f"stochastic {text}, {noise:.2g} x that of the full batch"
        return share, text

    def _alert(self, step: Observation, share: float, reason: str) -> Alert:
        measured = "measured at this step" if step.fresh else "from earlier probes, re-scaled"
        factor = self.target / share
        text = (
            f"Lower the learning rate from {step.rate:.3g} to {advised_rate(step, factor)}, or "
            "reach it by a warm-up of some hundred steps. It jumps, with this step, "
            f"{step.jump:.3g} x to {share:.2g} x what {step.optimizer} is likely to survive."
        )
        details = f"This step is not taken yet: {reason} ({measured}){carried_by(step)}."
        return alert(
            self.name,
            "critical",
            text,
            value=share,
            limit=1.0,
            step=step.index,
            layers=step.layers,
            details=details,
            advised_lr=factor * step.rate,
        )


def _share_of(margin: float, level: float) -> tuple[float, str]:
    return margin / level, f"margin {margin:.2g}, alert above {level:.2g}"
