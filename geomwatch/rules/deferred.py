"""An alert of the first step that waits for the second, when full-batch training shows itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from geomwatch.observation.step import Observation
from geomwatch.records import Alert


class Kept:
    """Keeps one alert until the next step; it is dropped if that sees the same data.

    Until then nobody knows, and full batches bear what mini-batches do not.
    """

    def __init__(self) -> None:
        self._alert: Alert | None = None

    def keep(self, alert: Alert) -> None:
        """Keep an alert."""
        self._alert = alert

    def release(self, step: Observation) -> Alert | None:
        """Return what was kept, once."""
        alert, self._alert = self._alert, None
        return None if step.same_data else alert

    def state_dict(self) -> dict[str, Any]:
        """Return the alert as primitives."""
        if self._alert is None:
            return {"alert": None}
        return {"alert": asdict(self._alert) | {"layers": list(self._alert.layers)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        found = state["alert"]
        self._alert = None
        if found is not None:
            self._alert = Alert(**{**found, "layers": tuple(found["layers"])})
