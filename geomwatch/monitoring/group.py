"""Several monitors of one run, as the two of a GAN: one name in front of each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from geomwatch.errors import UsageTypeError
from geomwatch.records import Alert, Record


@runtime_checkable
class Member(Protocol):
    """What a group asks of a Monitor, or of what stands for one in a host."""

    name: str

    @property
    def history(self) -> list[Record]:
        """All records so far."""

    @property
    def alerts(self) -> list[Alert]:
        """All alerts so far."""

    def pause(self) -> None:
        """Stop probing."""

    def resume(self) -> None:
        """Probe again."""

    def close(self) -> None:
        """Judge the last step and leave the host as it was."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and primitives."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""


class Group:
    """Monitors by name: `Group(generator=monitor_g, discriminator=monitor_d)`.

    Each is stepped by itself, where its own optimizer steps. In the log, in the lines of the sinks
    and in `scalars` its name stands in front of what it says. Share one JSON Lines sink, if wanted.

    Raises:
        UsageTypeError: a member is no Monitor.
    """

    def __init__(self, **monitors: Member) -> None:
        for name, monitor in monitors.items():
            if not isinstance(monitor, Member):
                raise UsageTypeError(
                    f"{name} must be a geomwatch.Monitor, got {type(monitor).__name__}. "
                    "Build one for each optimizer."
                )
            monitor.name = name
        self._monitors = monitors

    def __getitem__(self, name: str) -> Member:
        return self._monitors[name]

    @property
    def alerts(self) -> list[Alert]:
        """All alerts by step, their rule as "generator/loss_rise"."""
        named = [
            replace(alert, rule=f"{name}/{alert.rule}")
            for name, monitor in self._monitors.items()
            for alert in monitor.alerts
        ]
        return sorted(named, key=lambda alert: alert.step)

    def scalars(self, prefix: str = "geom/") -> dict[str, float]:
        """Return the last record of each for a tracker, as "geom/generator/lambda_max"."""
        flat: dict[str, float] = {}
        for name, monitor in self._monitors.items():
            if monitor.history:
                flat |= monitor.history[-1].scalars(f"{prefix}{name}/")
        return flat

    def pause(self) -> None:
        """Stop probing in all."""
        for monitor in self._monitors.values():
            monitor.pause()

    def resume(self) -> None:
        """Probe again in all."""
        for monitor in self._monitors.values():
            monitor.resume()

    def close(self) -> None:
        """Close all."""
        for monitor in self._monitors.values():
            monitor.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each by name."""
        return {name: monitor.state_dict() for name, monitor in self._monitors.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each its state back."""
        for name, monitor in self._monitors.items():
            monitor.load_state_dict(state[name])
