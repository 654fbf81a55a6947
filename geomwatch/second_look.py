"""When what a sentinel saw calls for a probe: it is much, and may or may not be noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from geomwatch.records import Estimate
from geomwatch.rules import Observation
from geomwatch.rules.levels import gradient_level
from geomwatch.rules.regime import FROM, HOLDS, LASTS, noise_of

_SHARE, _SHARE_CONTROLLED = 0.5, 0.15  # of the level, from where on it matters
_EARLY = 5  # step of the first look of a start
_SUSPECT = 0.3  # stability margin of such a start


class SecondLook:
    """Asks for the mean-square margin before the rules, or a cap, have to speak without it.

    The margin along the gradient is held against what batches of this size survive where they
    disagree on the curvature. Whether they do costs a probe and the products of micro-batches, so
    that it is looked at where the answer may change what is said or done: at half the level of a
    mean over 60 steps, .15 of it with controllers, whose limits are lower.

    Before step 20 micro-batches that agree say nothing, those that do not a great deal: a start is
    looked at once, from step 5 on, at half the level or a stability margin above 0.3.
    """

    def __init__(self, *, controlled: bool) -> None:
        self._share = _SHARE_CONTROLLED if controlled else _SHARE
        self._next = float(FROM)
        self._rate = math.inf  # of the last look
        self._early = _EARLY  # step from which on a start is looked at; FROM when it was

    def due(self, seen: Observation) -> bool:
        """Tell whether to probe at a step that a sentinel has just looked at."""
        margin = seen.gradient_margin
        if seen.deterministic or margin is None or margin.value is None:
            return False
        if seen.step < FROM:
            top = (seen.margin.value if seen.margin else None) or 0.0
            is_suspect = top > _SUSPECT or abs(margin.value) > _SHARE * gradient_level(seen)
            return seen.step >= self._early and is_suspect
        if seen.step < self._next and max(seen.lr, default=0.0) <= HOLDS * self._rate:
            return False
        return abs(margin.value) > self._share * gradient_level(seen)

    def at_start(self, step: int) -> bool:
        """Tell whether a probe of the first steps, made for a reason of its own, is to look."""
        return self._early <= step < FROM

    def probed(self, step: int, lr: Sequence[float], estimates: Mapping[str, Estimate]) -> None:
        """Take note of a probe; one that could not tell is not repeated."""
        mean_square = estimates.get("stochastic_margin")
        if mean_square is None or mean_square.status == "held":
            return
        if noise_of(estimates) is None:
            self._next = self._rate = math.inf
        if step >= _EARLY:
            self._early = FROM
        if step >= FROM and math.isfinite(self._next):
            self._next, self._rate = step * LASTS, max(lr, default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the rate up to which there is none; None for no end."""
        return {
            "next": _or_none(self._next),
            "rate": _or_none(self._rate),
            "early": self._early,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._next = math.inf if state["next"] is None else state["next"]
        self._rate = math.inf if state["rate"] is None else state["rate"]
        self._early = state["early"]


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
