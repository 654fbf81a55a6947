"""Little curvature, and yet a rugged loss."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, above, between, group, level
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule, Once, Persistence, soon_over


@dataclass(kw_only=True, eq=False, repr=False)
class FlatButRough(LatchedRule):
    """Warns of a loss that is rugged where the curvature is small, against the run's own past.

    The paper's rule, R > r_0 while the trace is small. R itself is mostly slope and curvature, so
    that the rule judges the share of it that a parabola leaves (`roughness_residual`; it is
    withheld within the noise of the loss): above `rough` and above `unusual` times the median of
    the run's earlier measurements, by `sure` standard errors, while tr(H) / D is below the `flat`
    quantile of its own earlier values, `persistence` steps after the first such probe.
    """

    name = "flat_but_rough"
    reads = ("roughness_residual", "trace_per_param")
    says = ("warning",)

    rough: float = level(0.1, "share that a parabola leaves", source="six healthy nets: below 0.08")
    unusual: float = level(5.0, "times the run's own median of it", source=GUESS, check=above(1))
    sure: float = level(2.0, "standard errors", source=GUESS)
    flat: float = level(0.25, "quantile of the run's own traces", source=GUESS, check=between(0, 1))
    least: int = level(4, "earlier measurements, at least", source=GUESS)
    most: int = level(50, "measurements that are remembered", source=GUESS)
    persistence: int = level(1, "steps that it must last: two measurements", source=GUESS)
    once: Once = group(soon_over, "when an alert is news again")

    _shares: Kept[deque[float]] = field(init=False)
    _traces: Kept[deque[float]] = field(init=False)
    _persistent: Kept[Persistence] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shares, self._traces = deque(maxlen=self.most), deque(maxlen=self.most)
        self._persistent = Persistence(self.persistence)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe that has measured both."""
        rough, trace = step.measured("roughness_residual"), step.measured("trace_per_param")
        if rough is None or trace is None or rough.value is None or trace.value is None:
            return None
        limit, flat = self._limits()
        error = rough.error or 0.0
        found = rough.value - self.sure * error > limit and trace.value < flat
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
            f"leaves {rough.value:.2g} ± {error:.1g} (alert above {limit:.2g}: the larger of "
            f"{self.rough:g} and {self.unusual:g} x this run's median), while the mean curvature "
            f"{trace.value:.2g} is in the lowest {self.flat:.0%} of its own past. Margins say "
            "little here. See whether the loss itself is noisy (low precision, a quantised layer, "
            "kinks), then damp the steps: clip the gradient, or lower the learning rate."
        )
        return alert(self.name, "warning", text, value=rough.value, limit=limit, step=step.index)

    def _limits(self) -> tuple[float, float]:
        """Return how rough and how flat the loss must be; out of reach while both are young."""
        if len(self._shares) < self.least:
            return math.inf, -math.inf
        limit = max(self.rough, self.unusual * statistics.median(self._shares))
        return limit, sorted(self._traces)[int(self.flat * len(self._traces))]
