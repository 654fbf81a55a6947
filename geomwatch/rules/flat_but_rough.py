"""Little curvature, and yet a rugged loss."""

from __future__ import annotations

import statistics
from collections import deque

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Estimate
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Latch, Persistence

_LEAST = 0.1  # of the roughness, that a parabola leaves
_UNUSUAL = 5.0  # times the run's own median
_SURE = 2.0  # standard errors
_FLAT = 0.25  # quantile of the run's own traces
_ENOUGH = 4  # measurements, before this one
_KEPT = 50


class FlatButRough(Resumable):
    """Warns of a loss that is rugged where the curvature is small, against the run's own past.

    The paper's rule, R > r_0 while the trace is small. R itself is mostly slope and curvature, so
    that the rule judges the share of it that a parabola leaves (`roughness_residual`; it is
    withheld within the noise of the loss): above 0.1 and above 5 x the median of the run's earlier
    measurements, by two standard errors, while tr(H) / D is below the lower quartile of its own
    earlier values, twice running. Healthy nets leave less than 0.04.
    """

    name = "flat_but_rough"

    _shares: Kept[deque[float]]
    _traces: Kept[deque[float]]
    _persistent: Kept[Persistence]
    _latch: Kept[Latch]

    def __init__(self) -> None:
        self._shares = deque(maxlen=_KEPT)
        self._traces = deque(maxlen=_KEPT)
        self._persistent = Persistence(1)  # two measurements
        self._latch = Latch(release=1, cooldown=0)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe that has measured both."""
        rough = _fresh(step, "roughness_residual")
        trace = _fresh(step, "trace_per_param")
        if rough is None or trace is None or rough.value is None or trace.value is None:
            return None
        limit, flat = self._limits()
        found = rough.value - _SURE * (rough.error or 0.0) > limit and trace.value < flat
        lasting = self._persistent(found, step.index)
        self._shares.append(rough.value)
        self._traces.append(trace.value)
        if not found:
            self._latch.calm(step.index)
            return None
        if not lasting or not self._latch.admit("warning", step.index):
            return None
        text = (
            f"the loss is flat but rough: of its variation within 5 % of the weights a parabola "
            f"leaves {rough.value:.2g} ± {rough.error or 0.0:.1g} (alert above {limit:.2g}: the "
            f"larger of {_LEAST:g} and {_UNUSUAL:g} x this run's median), while the mean curvature "
            f"{trace.value:.2g} is in the lowest quarter of its own past. Margins say little here. "
            "See whether the loss itself is noisy (low precision, a quantised layer, kinks), then "
            "damp the steps: clip the gradient, or lower the learning rate."
        )
        return alert(self.name, "warning", text, value=rough.value, limit=limit, step=step.index)

    def _limits(self) -> tuple[float, float]:
        """Return how rough and how flat the loss must be; out of reach while both are young."""
        if len(self._shares) < _ENOUGH:
            return float("inf"), float("-inf")
        limit = max(_LEAST, _UNUSUAL * statistics.median(self._shares))
        quartile = sorted(self._traces)[int(_FLAT * len(self._traces))]
        return limit, quartile


def _fresh(step: Observation, name: str) -> Estimate | None:
    found = (step.estimates or {}).get(name)
    return None if found is None or found.status == "held" else found
