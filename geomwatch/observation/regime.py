"""Which limit holds: that of mini-batches, or that of training on the same data at each step."""

from __future__ import annotations

from collections.abc import Mapping

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Estimate

EDGE = 0.9  # of the limit: from here on full-batch training is at the edge of stability
FROM = 20  # steps; before, micro-batches agree with one another in runs that fail as well
LASTS = 3.0  # times the step it was measured at: noise grows as the loss falls,
HOLDS = 2.0  # and times the rate
_QUIET, _QUIET_STILL, _NOISY = 1.3, 1.8, 2.5  # mean-square over full-batch margin
_NEAR = 0.1  # margin; batches that agree far below the limit may differ near it


class Regime(Resumable):
    """Knows how much the noise of batches adds to the margin, for a while after it was measured.

    Deterministic is a run whose steps all see the same data, in any order: it settles at a margin
    of 1, the edge of stability, and mini-batch levels would call that an emergency. A small spread
    of curvature *within* the batch is not enough: at the start of mini-batch runs, those that fail
    included, the stochastic margin is within a few percent of the full-batch one.

    Noise dominates where the stochastic margin is more than 2.5 x the full-batch one: most of it
    is then what a larger batch would take away. Below 1.3 x, at a margin of at least 0.1, it
    hardly matters, until it is 1.8 x: a GPT under SGD lives by the limit of the full batch, though
    its batches are small (docs/decisions/018).
    """

    _noise: Kept[float | None]
    _agree: Kept[bool]
    _step: Kept[int]
    _rate: Kept[float]

    def __init__(self, *, holds: float = HOLDS) -> None:
        self._holds = holds  # up to so many times the rate it was measured at
        self._noise = None
        self._agree = False  # micro-batches
        self._step, self._rate = 0, 0.0  # at which it was measured

    def __call__(self, step: Observation) -> None:
        """Take note of what a probe has measured."""
        estimates = step.estimates or {}
        found = noise_of(estimates)
        if found is not None and step.index >= FROM:
            self._noise = found
            self._agree = batches_agree(estimates, still=self._agree)
            self._step, self._rate = step.index, max(step.lr, default=0.0)

    def noise(self, step: Observation) -> float | None:
        """Return the stochastic margin in units of the full-batch one; None if not known."""
        if step.same_data:
            return 1.0
        holds = max(step.lr, default=0.0) <= self._holds * self._rate
        return self._noise if holds and step.index <= LASTS * self._step else None

    def is_noisy(self, step: Observation) -> bool | None:
        """Tell whether batch noise dominates; None where it was never measured."""
        noise = self.noise(step)
        return None if noise is None else is_noisy(noise)

    def is_quiet(self, step: Observation) -> bool:
        """Tell whether batch noise is known to matter hardly at all."""
        return step.same_data or (self.noise(step) is not None and self._agree)

    def is_edge(self, step: Observation, margin: float, *, below: float) -> bool:
        """Tell whether full-batch training has settled at the edge of stability."""
        return step.same_data and EDGE <= margin <= below


def is_noisy(noise: float) -> bool:
    """Tell whether noise dominates at this mean-square over full-batch margin."""
    return noise > _NOISY


def noise_of(estimates: Mapping[str, Estimate]) -> float | None:
    """Return the stochastic margin in units of the full-batch one, where a probe has had both."""
    mean_square, margin = estimates.get("stochastic_margin"), estimates.get("stability_margin")
    if mean_square is None or mean_square.status != "ok" or mean_square.value is None:
        return None
    if margin is None or margin.status != "ok" or not margin.value or margin.value <= 0:
        return None
    return max(mean_square.value / margin.value, 1.0)


def batches_agree(estimates: Mapping[str, Estimate], *, still: bool) -> bool:
    """Tell whether micro-batches were seen to agree on the curvature, at a margin that counts.

    `still` if they did so before: measured anew, their noise is now a little above a limit and now
    a little below.
    """
    noise, margin = noise_of(estimates), estimates.get("stability_margin")
    if noise is None or margin is None or margin.value is None:
        return False
    return noise < (_QUIET_STILL if still else _QUIET) and margin.value >= _NEAR
