"""What a rule sees, and what it has in common with the other rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from geomwatch.monitoring.progress import Settled
from geomwatch.records import Alert, Estimate


@dataclass(frozen=True, slots=True)
class Observation:
    """One optimizer step as the rules see it, before the step is taken.

    `margin` is the stability margin at this step's learning rate: measured now when `fresh`,
    otherwise the last one re-scaled; `gradient_margin`, measured more often, is the small-batch
    margin along the coming preconditioned step d = S^2 g, limit_ratio * d'(H + W)d / g'd (see
    `stability`): eta BS / (2 (1-mu)) for SGD with momentum, negative where the loss is concave.
    `settled` is what became known of the step before.
    """

    index: int  # optimizer steps taken before it
    lr: tuple[float, ...]
    optimizer: str = "the optimizer"
    margin: Estimate | None = None
    fresh: bool = False
    gradient_margin: Estimate | None = None
    gradient_fresh: bool = False
    cold_start: float = 1.0  # factor of Adam's first steps that both margins leave out
    adaptive: bool = False  # the optimizer preconditions its steps, as Adam does
    limit_ratio: float = 1.0  # full-batch over small-batch limit of the coming step
    peak: tuple[float, ...] = ()  # the highest rate each group is known to be headed for
    same_data: bool = False  # every step sees the same data, as in full-batch training
    estimates: Mapping[str, Estimate] | None = None  # of a probe at this step
    provenance: Mapping[str, str | int | float | bool] | None = None  # the probe obtained them
    loss: float | None = None  # of a probe at this step
    items: int = 0  # of the batch last measured on, over all ranks
    layers: tuple[str, ...] = ()
    settled: Settled | None = None


class Rule(Protocol):
    """History in, at most one alert out. Everything is counted in optimizer steps."""

    def __call__(self, step: Observation) -> Alert | None:
        """Look at one step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the rule as primitives."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the memory."""


class Latch:
    """Lets an alert out once: again only when it gets worse, or after release and cool-down."""

    _ORDER = ("", "info", "warning", "critical")

    def __init__(self, *, release: int = 15, cooldown: int = 25) -> None:
        self._release = release  # calm steps until an alert is over
        self._cooldown = cooldown  # steps after that until the next one
        self.severity = ""
        self._calm_since: int | None = None
        self._quiet_until = 0

    def admit(self, severity: str, step: int) -> bool:
        """Tell whether an alert of this severity is news."""
        self._calm_since = None
        if self._ORDER.index(severity) <= self._ORDER.index(self.severity):
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

    def state_dict(self) -> dict[str, Any]:
        """Return severity and counters."""
        return {"severity": self.severity, "calm": self._calm_since, "quiet": self._quiet_until}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over severity and counters."""
        self.severity, self._calm_since = state["severity"], state["calm"]
        self._quiet_until = state["quiet"]


class Persistence:
    """How long a condition has held without a measurement to the contrary."""

    def __init__(self, steps: int) -> None:
        self._needed = steps
        self._since: int | None = None

    def __call__(self, present: bool, step: int) -> bool:
        """Take a measurement; tell whether the condition has held for the steps needed."""
        if not present:
            self._since = None
            return False
        if self._since is None:
            self._since = step
        return step - self._since >= self._needed

    def state_dict(self) -> dict[str, Any]:
        """Return the step since which the condition holds."""
        return {"since": self._since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the step."""
        self._since = state["since"]


def state_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the state of a rule's parts."""
    return {name: part.state_dict() for name, part in parts.items()}


def load_into(parts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Give each part of a rule its state back."""
    for name, part in parts.items():
        loader: Callable[[Any], None] = part.load_state_dict
        loader(state[name])
