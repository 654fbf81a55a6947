"""What the margins have to stay below while the loss still stands where it began."""

from __future__ import annotations

import math
import statistics
from collections import deque

from geomwatch.controllers.learning_rate_cap.limit import CapLimits
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.batch_noise import noise_part
from geomwatch.observation.margins import SmoothedMargin
from geomwatch.observation.observer import Observer
from geomwatch.observation.step import Observation
from geomwatch.records import Estimate


class Start(Resumable):
    """Keeps both parts of the stochastic margin where good starts have them.

    At their tuned rates nets have a noise part N of .03 to .12 at step 0 under SGD, of .05 to .8
    under methods that adapt, whatever their batch, and a margin M of .01 to .6. Noise grows as the
    loss falls, so that a rate that is far too large shows here before any curvature along the
    gradient does. Measured by every probe of a start, as far as it counts (`NoisePart.counted`),
    and held against the rate of each step: while a loss stands where it began, a schedule takes
    the rate no higher than a good start bears.

    A start lasts `Observer.settles` steps, and on until the loss has fallen (see `Fall`).
    """

    _noise: Kept[SmoothedMargin]
    _margin: Kept[SmoothedMargin]
    _fall: Kept[Fall]

    def __init__(self, limits: CapLimits) -> None:
        self._limits = limits
        self._noise, self._margin = SmoothedMargin(0.0), SmoothedMargin(0.0)  # the last ones
        self._fall = Fall(limits.fallen)

    def update(self, step: Observation) -> None:
        """Take note of the loss of the step before, and of what a probe has measured."""
        if step.settled is not None and step.settled.loss is not None:
            self._fall.update(step.settled.loss)
        if not step.fresh or self.is_over(step):
            return
        self._margin.update(step.margin, step.lr)
        found = noise_part(step)
        if found is not None:
            counted = Estimate(found.counted(step), found.error, "stderr")
            self._noise.update(counted, step.lr)

    def is_over(self, step: Observation) -> bool:
        """Tell whether other limits have taken over."""
        return step.index >= Observer.settles and not self._fall.is_awaited

    def allows(self, step: Observation) -> float:
        """Return the factor of the present rates at which both are within limits; inf for none."""
        if step.same_data or self.is_over(step):
            return math.inf
        limits = self._limits
        noise = limits.start_noise_adaptive if step.adaptive else limits.start_noise_sgd
        share = max(self._noise.at(step.lr) / noise, self._margin.at(step.lr) / limits.start_margin)
        return 1 / share if share > 0 else math.inf


class Fall(Resumable):
    """Tells whether the loss has clearly fallen since the first steps.

    By more than `errors` standard errors of the difference between the mean of the first ten
    losses and that of the last ten.
    """

    _first: Kept[list[float]]
    _last: Kept[deque[float]]
    is_awaited: Kept[bool]

    def __init__(self, errors: float) -> None:
        self._errors = errors
        self._first, self._last = [], deque(maxlen=Observer.settles // 2)
        self.is_awaited = False  # without a loss there is nothing to wait for

    def update(self, loss: float) -> None:
        """Take in the loss of a step."""
        enough = Observer.settles // 2
        if not math.isfinite(loss) or (not self.is_awaited and len(self._first) == enough):
            return
        if len(self._first) < enough:
            self._first.append(loss)
            self.is_awaited = True
            return
        self._last.append(loss)
        if len(self._last) == enough:
            self.is_awaited = not self._has_fallen()

    def _has_fallen(self) -> bool:
        variance = statistics.variance(self._first) + statistics.variance(self._last)
        fallen = statistics.fmean(self._first) - statistics.fmean(self._last)
        return fallen > self._errors * math.sqrt(variance / len(self._last))
