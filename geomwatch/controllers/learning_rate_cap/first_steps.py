"""What the batches of the first steps allow, before a gradient margin shows anything."""

from __future__ import annotations

import math
from typing import Any

from geomwatch.observation.batch_noise import YOUNG, noise_part
from geomwatch.observation.margins import SmoothedMargin
from geomwatch.observation.regime import FROM
from geomwatch.records import Estimate
from geomwatch.rules import Observation

_SGD, _ADAPTIVE = 0.1, 1.0  # the noise part of the stochastic margin to stay below,
_FULL_BATCH = 0.7  # and the margin of the full batch


class FirstSteps:
    """Keeps both parts of the stochastic margin where good starts have them.

    At their tuned rates nets have a noise part N of .03 to .12 at step 0 under SGD, of .05 to .8
    under methods that adapt, whatever their batch (see `rules.batch_noise`), and a margin M of .01
    to .6. Noise grows as the loss falls, so that a rate that is far too large shows first here.
    Measured by the probes of the first ten steps, as far as it counts (`NoisePart.counted`); from
    step 20 on it is for `Limit`.
    """

    def __init__(self) -> None:
        self._noise, self._margin = SmoothedMargin(0.0), SmoothedMargin(0.0)  # the last ones

    def update(self, step: Observation) -> None:
        """Take note of what a probe has measured."""
        if step.index not in YOUNG or not step.fresh:
            return
        self._margin.update(step.margin, step.lr)
        found = noise_part(step)
        if found is not None:
            counted = Estimate(found.counted(step), found.error, "stderr")
            self._noise.update(counted, step.lr)

    def allows(self, step: Observation) -> float:
        """Return the factor of the present rates at which both are within limits; inf for none."""
        if step.index >= FROM or step.same_data:
            return math.inf
        noise, margin = self._noise.at(step.lr), self._margin.at(step.lr)
        share = max(noise / (_ADAPTIVE if step.adaptive else _SGD), margin / _FULL_BATCH)
        return 1 / share if share > 0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """Return the last measurements."""
        return {"noise": self._noise.state_dict(), "margin": self._margin.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._noise.load_state_dict(state["noise"])
        self._margin.load_state_dict(state["margin"])
