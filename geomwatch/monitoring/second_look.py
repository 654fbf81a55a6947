"""When what a sentinel saw calls for a probe: it is much, and may or may not be noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.batch_noise import NOISE, noise_ratio
from geomwatch.observation.gradient_level import GRADIENT
from geomwatch.observation.observer import Observer
from geomwatch.observation.step import Observation
from geomwatch.records import Estimate

_SHARE, _SHARE_CONTROLLED = 0.43, 0.13  # of the level, from where on it matters
_EARLY, _AGAIN = 5, 8  # steps of the looks at a start
_SUSPECT = 0.3  # stability margin of one
_NOISY, _STILL_NOISY = 0.4, 0.5  # of the level of batch noise, by the last look


class SecondLook(Resumable):
    """Asks for the stochastic margin before the rules, or a cap, have to speak without it.

    The gradient margin is held against what batches of this size survive where they
    disagree on the curvature. Whether they do costs a probe and the products of micro-batches, so
    that it is looked at where the answer may change what is said or done: at .43 of the level of a
    mean over 60 steps, .13 of it with controllers, whose limits are lower.

    Before step 20 micro-batches that agree say nothing, those that do not a great deal (see
    `BatchNoise`). The first probe has looked; from step 5 on a start is looked at again at
    that share, a stability margin above 0.3 or two fifths of what batch noise is warned of, and
    from step 8 on if it is still half of that.
    """

    _next: Kept[float]
    _rate: Kept[float]
    _early: Kept[int]
    _noise: Kept[float]

    def __init__(self, *, controlled: bool) -> None:
        self._share = _SHARE_CONTROLLED if controlled else _SHARE
        self._next = float(Observer.settles)
        self._rate = math.inf  # of the last look
        self._early = _EARLY  # step from which on a start is looked at
        self._noise = 0.0  # noise part of the stochastic margin at the start, over the rate

    def due(self, step: Observation) -> bool:
        """Tell whether to probe at a step that a sentinel has just looked at."""
        margin = step.gradient_margin
        if step.same_data or margin is None or margin.value is None:
            return False
        if step.margin is not None and step.margin.status != "ok":  # shares of no limit
            return False
        if step.index < Observer.settles:
            return step.index >= self._early and self._is_suspect(step, abs(margin.value))
        if step.index < self._next and max(step.lr, default=0.0) <= Observer.holds * self._rate:
            return False
        return abs(margin.value) > self._share * GRADIENT.at(step)

    def _is_suspect(self, step: Observation, along: float) -> bool:
        noise = max(step.lr, default=0.0) * self._noise / NOISE.at(step)
        if self._early > _EARLY:
            return _STILL_NOISY < noise <= 1  # what is more was said
        top = (step.margin.value if step.margin else None) or 0.0
        return noise > _NOISY or top > _SUSPECT or along > _SHARE * GRADIENT.at(step)

    def at_start(self, step: int) -> bool:
        """Tell whether a probe of the first steps, made for a reason of its own, is to look."""
        return self._early <= step < Observer.settles

    def probed(self, step: int, lr: Sequence[float], estimates: Mapping[str, Estimate]) -> None:
        """Take note of a probe; one that could not tell is not repeated."""
        stochastic = estimates.get("stochastic_margin")
        if stochastic is None or stochastic.status == "held":
            return
        rate, margin = max(lr, default=0.0), estimates.get("stability_margin")
        if noise_ratio(estimates) is None:
            if margin is not None and (margin.value or 0.0) > 0:  # else it may be had later
                self._next = self._rate = math.inf
        elif step < Observer.settles and rate > 0 and margin is not None:
            self._noise = ((stochastic.value or 0.0) - (margin.value or 0.0)) / rate
        if step >= _EARLY:
            self._early = _AGAIN if step < _AGAIN else Observer.settles
        if step >= Observer.settles and math.isfinite(self._next):
            self._next, self._rate = step * Observer.lasts, rate
