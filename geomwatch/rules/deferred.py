"""An alert of the first step that waits for the second, when full-batch training shows itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Alert


@dataclass(kw_only=True, eq=False, repr=False)
class Deferring(Resumable):
    """A rule that may keep one alert until the next step, and drops it if that sees the same data.

    Until then nobody knows, and full batches bear what mini-batches do not.
    """

    waits: Kept[bool] = field(init=False, default=False)
    _deferred: Kept[Alert | None] = field(init=False, default=None)

    def _defer(self, alert: Alert) -> None:
        self._deferred, self.waits = alert, True

    def _released(self, step: Observation) -> Alert | None:
        """Return what was kept, once."""
        alert, self._deferred, self.waits = self._deferred, None, False
        return None if step.same_data else alert
