"""Which limit holds: that of mini-batches, or that of training on the same data at each step."""

from __future__ import annotations

from typing import Any

from geomwatch.rules.observation import Observation

EDGE = 0.9  # of the limit: from here on full-batch training is at the edge of stability
_NOISY = 2.5  # mean-square over full-batch margin


class Regime:
    """Knows how much the noise of batches adds to the margin, as the last whole probe had it.

    Deterministic is a run whose steps all see the same data, in any order: it settles at a margin
    of 1, the edge of stability, and mini-batch levels would call that an emergency. A small spread
    of curvature *within* the batch is not enough: at the start of mini-batch runs, those that fail
    included, the mean-square margin is within a few percent of the full-batch one.

    Noise dominates where the mean-square margin is more than 2.5 x the full-batch one: most of it
    is then what a larger batch would take away.
    """

    def __init__(self) -> None:
        self._noise: float | None = None

    def __call__(self, seen: Observation) -> None:
        """Take note of what a probe has measured."""
        estimates = seen.estimates or {}
        mean_square, margin = estimates.get("stochastic_margin"), seen.margin
        if mean_square is None or mean_square.status != "ok" or margin is None or not seen.fresh:
            return
        if mean_square.value is not None and margin.value is not None and margin.value > 0:
            self._noise = max(mean_square.value / margin.value, 1.0)

    def noise(self, seen: Observation) -> float | None:
        """Return the mean-square margin in units of the full-batch one; None if not known."""
        return 1.0 if seen.deterministic else self._noise

    def is_noisy(self, seen: Observation) -> bool | None:
        """Tell whether batch noise dominates; None where it was never measured."""
        noise = self.noise(seen)
        return None if noise is None else noise > _NOISY

    def is_edge(self, seen: Observation, margin: float, *, below: float) -> bool:
        """Tell whether full-batch training has settled at the edge of stability."""
        return seen.deterministic and EDGE <= margin <= below

    def state_dict(self) -> dict[str, Any]:
        """Return what the last whole probe had."""
        return {"noise": self._noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._noise = state["noise"]
