"""What a rule is, and what rules have in common: an alert is let out once, and when it lasts."""

from __future__ import annotations

from typing import Protocol

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Alert

_ORDER = ("", "info", "warning", "critical")


class Rule(Protocol):
    """History in, at most one alert out. Everything is counted in optimizer steps.

    A rule whose verdicts depend on earlier steps is `Resumable`, and annotates as `Kept[...]` what
    it remembers of them.
    """

    name: str

    def __call__(self, step: Observation) -> Alert | None:
        """Look at one step."""


class Latch(Resumable):
    """Lets an alert out once: again only when it gets worse, or after release and cool-down."""

    severity: Kept[str]
    _calm_since: Kept[int | None]
    _quiet_until: Kept[int]

    def __init__(self, *, release: int = 15, cooldown: int = 25) -> None:
        self._release = release  # calm steps until an alert is over
        self._cooldown = cooldown  # steps after that until the next one
        self.severity = ""
        self._calm_since = None
        self._quiet_until = 0

    def admit(self, severity: str, step: int) -> bool:
        """Tell whether an alert of this severity is news."""
        self._calm_since = None
        if _ORDER.index(severity) <= _ORDER.index(self.severity):
            return False
        if step < self._quiet_until and severity != "critical":
            return False
        self.severity = severity
        return True

    def calm(self, step: int) -> None:
        """Note that the condition is clearly absent at this step."""
        if not self.severity:
            return
        if self._calm_since is None:
            self._calm_since = step
        if step - self._calm_since >= self._release:
            self.severity = ""
            self._calm_since = None
            self._quiet_until = step + self._cooldown

    def between(self) -> None:
        """Note that the condition is neither present nor clearly absent."""
        self._calm_since = None


class Persistence(Resumable):
    """How long a condition has held without a measurement to the contrary."""

    _since: Kept[int | None]

    def __init__(self, steps: int) -> None:
        self._needed = steps
        self._since = None

    def __call__(self, present: bool, step: int) -> bool:
        """Take a measurement; tell whether the condition has held for the steps needed."""
        if not present:
            self._since = None
            return False
        if self._since is None:
            self._since = step
        return step - self._since >= self._needed
