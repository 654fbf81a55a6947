"""Whether a measured margin can be believed."""

from __future__ import annotations

from collections.abc import Mapping

from geomwatch.estimators.noise_floor import NO_FUNCTION
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Estimate

_MATTERS = 0.5  # margins that can't be as large need no belief
# Quantities that compare losses, which tells whether two evaluations agree.
_BY_LOSSES = (
    "roughness",
    "roughness_residual",
    "normalized_sharpness",
    "normalized_sharpness_linf",
)


class Trust(Resumable):
    """Gives the reason why the margin must not be believed, "" where there is none.

    Either double backward was found wrong and is used all the same, or the loss differs between
    two evaluations at the same weights, as the last probe that looked had it, or the margin's own
    error exceeds it and reaches beyond 0.5. A large error below that is no reason: a Ritz value is
    a lower bound of the largest eigenvalue, so that a margin above its limit stays above it.
    """

    _moving: Kept[bool]

    def __init__(self) -> None:
        self._moving = False  # the loss is no function of the weights

    def __call__(self, step: Observation) -> str:
        """Judge a probe; what it did not look at stays as it was."""
        if step.estimates is not None:
            self._note(step.estimates)
        how = step.provenance or {}
        if how.get("validation_failed") and how.get("backend") == "double_backward":
            return str(how.get("validation", "double backward is wrong"))
        if self._moving:
            return NO_FUNCTION
        margin = step.margin if step.fresh else None
        if margin is None or margin.value is None or margin.error is None:
            return ""
        if margin.error > max(abs(margin.value), _MATTERS - margin.value):
            return f"its error {margin.error:.2g} exceeds the margin {margin.value:.2g} itself"
        return ""

    def _note(self, estimates: Mapping[str, Estimate]) -> None:
        for name in _BY_LOSSES:
            found = estimates.get(name)
            if found is not None and found.age == 0:
                self._moving = found.reason.startswith(NO_FUNCTION)
                return
