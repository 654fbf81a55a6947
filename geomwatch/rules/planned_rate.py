"""Before the first step: the margin at the highest rate that the schedule is headed for."""

from __future__ import annotations

from typing import Any

from geomwatch.records import Alert, Severity
from geomwatch.rules.message import alert, carried_by
from geomwatch.rules.observation import Observation
from geomwatch.sinks import format_estimate

_WARNING, _CRITICAL = 3.0, 5.0
_TARGET = 1.0  # that the advice aims for
_AHEAD = 1.05  # times the first rate: else there is no plan, and `stability_margin` judges


class PlannedRate:
    """Asks what the margin would be if the planned peak were applied to the first weights.

    M(0) * peak / lr(0) > 3 is a warning, > 5 critical, at the first step that moves the weights;
    a warm-up that starts at 0 is judged at its first positive rate. Curvature changes on the way
    up, mostly down, so that this is a forecast and no measurement: peaks of up to 2.4 train well.
    The highest rates are those that the groups of the optimizer carry (see `planned_rates`).
    """

    name = "planned_rate"

    def __init__(self) -> None:
        self._under_way = False

    def __call__(self, seen: Observation) -> Alert | None:
        """Judge the first step at a positive rate."""
        if self._under_way or max(seen.lr, default=0.0) <= 0:
            return None
        self._under_way = True
        margin = seen.margin
        if not seen.fresh or margin is None or margin.value is None or margin.status != "ok":
            return None
        growth = max(
            (peak / lr for peak, lr in zip(seen.peak, seen.lr, strict=False) if lr > 0), default=1.0
        )
        expected = margin.value * growth
        if growth < _AHEAD or expected <= _WARNING:
            return None
        severity: Severity = "critical" if expected > _CRITICAL else "warning"
        level = _CRITICAL if severity == "critical" else _WARNING
        few = "no peak" if severity == "critical" else "few peaks"
        peak, factor = max(seen.peak), _TARGET / expected
        text = (
            f"the schedule is headed for a learning rate of {peak:.3g}, at which the stability "
            f"margin of {seen.optimizer} would be {expected:.2g} in the present weights (alert "
            f"above {level:g}, unstable at 1; {format_estimate(margin)} at the {max(seen.lr):.3g} "
            f"of this step){carried_by(seen)}. Curvature may give way during a warm-up, but {few} "
            f"above {level:g} trained in the runs behind this level. "
            f"Lower the peak to about {peak * factor:.1g} ({factor:.2g} x), or warm up for longer."
        )
        return alert(
            self.name,
            severity,
            text,
            value=expected,
            limit=level,
            step=seen.step,
            layers=seen.layers,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return whether the run is under way."""
        return {"under_way": self._under_way}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._under_way = state["under_way"]
