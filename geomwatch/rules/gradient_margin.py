"""The curvature that the steps themselves meet nears the limit: what sentinels tell."""

from __future__ import annotations

from typing import Any

from geomwatch.records import Alert, Severity
from geomwatch.rules.message import alert
from geomwatch.rules.observation import Latch, Observation, load_into, state_of
from geomwatch.rules.recent import RecentMargins

_AT_ONCE = 2.0  # of a single measurement: beyond the limit in the steps' own direction
_EDGE_AT_ONCE = 3.0
_LEVEL = 0.4  # of the geometric mean, in units of the full-batch limit
_EDGE_LEVEL = 1.3  # where every step sees the same data, which lives at 1
_RELEASE = 0.7  # of the level
_SPAN = 60  # steps that the mean looks back
_ENOUGH = 4  # measurements in a mean
_WARM_UP = 20  # steps


class GradientMargin:
    """Warns when the curvature along the gradient nears the limit of the optimizer for long.

    d'(H + W)d / g'd along the coming step d = S^2 g, in units of the full-batch limit: what
    sentinels measure between probes, at a fraction of their cost. One value says little, since
    batches differ; the geometric mean over the last 60 steps, re-scaled to the present rate, must
    exceed 0.4. It lies below the margin of λ_max, which no single direction reaches, but follows a
    rate that rises within tens of steps, where two probes lie further apart. A single value
    above 2 is critical.
    """

    name = "gradient_margin"

    def __init__(self) -> None:
        self._recent = RecentMargins(most=_SPAN, steps=_SPAN)
        self._latch = Latch()

    def __call__(self, seen: Observation) -> Alert | None:
        """Judge a sentinel, beside what was measured along the gradient by probes."""
        margin = seen.gradient_margin
        if not seen.gradient_fresh or margin is None or margin.value is None:
            return None
        lr = max(seen.lr, default=1.0)
        if lr <= 0 or (seen.margin is not None and seen.margin.status != "ok"):
            return None
        now = margin.value / seen.noise_ratio
        self._recent.add(seen, now)
        if seen.fresh:  # of a probe StabilityMargin speaks
            return None
        mean, count = self._recent.mean(seen)
        assert mean is not None  # of this one at least
        at_once = _EDGE_AT_ONCE if seen.deterministic else _AT_ONCE
        if now > at_once and seen.step > 0:
            return self._raise("critical", seen, now, at_once, "measured once")
        level = _EDGE_LEVEL if seen.deterministic else _LEVEL
        if mean <= level or count < _ENOUGH or seen.step < _WARM_UP:
            self._latch.calm(seen.step) if mean < _RELEASE * level else self._latch.between()
            return None
        shown = f"mean of {count} measurements in {_SPAN} steps"
        return self._raise("warning", seen, mean, level, shown)

    def _raise(
        self, severity: Severity, seen: Observation, value: float, level: float, shown: str
    ) -> Alert | None:
        if not self._latch.admit(severity, seen.step):
            return None
        lr, factor = max(seen.lr), _RELEASE * _LEVEL / value
        relation = "is beyond" if value > 1 else "comes close to"
        message = (
            f"learning rate {lr:.3g} {relation} what the curvature along the steps allows for "
            f"{seen.optimizer}: {value:.2f} of the limit, {shown} (alert above {level:g}). Lower "
            f"the learning rate to about {lr * factor:.1g} ({factor:.2g} x), or end its warm-up "
            "there."
        )
        return alert(self.name, severity, message, value=value, limit=level, step=seen.step)

    def state_dict(self) -> dict[str, Any]:
        """Return the recent measurements and the latch."""
        return state_of({"latch": self._latch, "recent": self._recent})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the recent measurements and the latch."""
        load_into({"latch": self._latch, "recent": self._recent}, state)
