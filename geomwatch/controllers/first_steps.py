"""What the batches of the first steps allow, before a margin along the gradient shows anything."""

from __future__ import annotations

import math
from typing import Any

from geomwatch.controllers.margins import SmoothedMargin
from geomwatch.records import Estimate
from geomwatch.rules import Observation
from geomwatch.rules.batch_noise import YOUNG, batch_noise
from geomwatch.rules.regime import FROM

_SGD, _ADAPTIVE = 0.1, 1.0  # the noise part of the mean-square margin to stay below


class FirstSteps:
    """Keeps the noise part of the mean-square margin, N, where good starts have it.

    At their tuned rates nets have an N of .03 to .12 at step 0 under SGD, of .05 to .8 under
    methods that adapt (see `rules.batch_noise`), whatever their batch. Noise grows as the loss
    falls, so that a rate that is far too large shows first here. Measured by the probes of the
    first ten steps; from step 20 on it is for `Limit`.
    """

    def __init__(self) -> None:
        self._noise = SmoothedMargin(0.0)  # the last one

    def update(self, seen: Observation) -> None:
        """Take note of what a probe has measured."""
        found = batch_noise(seen) if seen.step in YOUNG else None
        if found is not None:
            self._noise.update(Estimate(found.value, found.error, "stderr"), seen.lr)

    def allows(self, seen: Observation) -> float:
        """Return the factor of the present rates at which N is at its limit; inf for none."""
        noise = self._noise.at(seen.lr)
        if seen.step >= FROM or seen.deterministic or noise <= 0:
            return math.inf
        return (_ADAPTIVE if seen.adaptive else _SGD) / noise

    def state_dict(self) -> dict[str, Any]:
        """Return the last measurement."""
        return {"noise": self._noise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._noise.load_state_dict(state["noise"])
