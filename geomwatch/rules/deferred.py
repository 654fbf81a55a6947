"""An alert of the first step that waits for the second, when full-batch training shows itself."""

from __future__ import annotations

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Alert


class Deferred(Resumable):
    """Keeps one alert until the next step; it is dropped if that sees the same data.

    Until then nobody knows, and full batches bear what mini-batches do not.
    """

    _alert: Kept[Alert | None]

    def __init__(self) -> None:
        self._alert = None

    def keep(self, alert: Alert) -> None:
        """Keep an alert."""
        self._alert = alert

    def release(self, step: Observation) -> Alert | None:
        """Return what was kept, once."""
        alert, self._alert = self._alert, None
        return None if step.same_data else alert
