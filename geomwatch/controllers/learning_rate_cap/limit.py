"""What the gradient margin has to stay below, as far as micro-batches can tell."""

from __future__ import annotations

from typing import Any

from geomwatch.observation.regime import FROM, batches_agree, noise_of
from geomwatch.rules import Observation

_SGD, _ADAPTIVE = 2.0, 1.0  # where nothing is known of micro-batches
_LOW, _HIGH, _QUIET = 1.0, 2.0, 5.0  # where it is; the last where noise hardly matters
_MEAN_SQUARE = 1.25  # the stochastic margin aimed for


class Limit:
    """Translates the limit of the mean square into one of the gradient margin.

    Healthy runs at their tuned rates have a stochastic margin M_ms near 1, whatever the net, where
    noise matters; the margin G along the gradient, which costs a fraction, is then anything from .5
    to 3. So the limit of G is what it would be at M_ms = 1.25 by the last probe that had both, but
    between 1 and 2: a probe sees one batch, and older ones saw less noise. Where noise hardly
    matters (see `regime`) M_ms says nothing, and it is 5. Without micro-batches, as with BatchNorm,
    it is 2 for SGD and 1 for methods that adapt.
    """

    def __init__(self) -> None:
        self._is_quiet = False
        self._share: float | None = None  # G / M_ms

    def update(self, step: Observation) -> None:
        """Take note of what a probe has measured."""
        if step.index < FROM:
            return
        estimates = step.estimates or {}
        if noise_of(estimates) is not None:
            self._is_quiet = batches_agree(estimates, still=self._is_quiet)
        mean_square = estimates.get("stochastic_margin")
        along = step.gradient_margin
        if mean_square is None or mean_square.status != "ok" or not mean_square.value:
            return
        if along is not None and along.value is not None and along.status == "ok":
            self._share = along.value / mean_square.value

    def at(self, step: Observation) -> float:
        """Return the limit, in units of that of small batches."""
        if self._is_quiet:
            return _QUIET
        if self._share is None:
            return _ADAPTIVE if step.adaptive else _SGD
        return min(max(_MEAN_SQUARE * self._share, _LOW), _HIGH)

    def state_dict(self) -> dict[str, Any]:
        """Return what the last probe had."""
        return {"is_quiet": self._is_quiet, "share": self._share}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._is_quiet, self._share = state["is_quiet"], state["share"]
