"""A margin between two measurements: held, and re-scaled to the learning rate of the day."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from geomwatch.records import Estimate


class Rescaled:
    """The last measurement of a margin, which is proportional to the learning rate."""

    def __init__(self) -> None:
        self._margin: Estimate | None = None
        self._lr: tuple[float, ...] = ()  # of the measurement

    def update(self, margin: Estimate | None, lr: tuple[float, ...]) -> None:
        """Take a measurement made at learning rates `lr`."""
        self._margin, self._lr = margin, lr

    def ratio(self, lr: Sequence[float]) -> float:
        """Return the largest factor by which a group's rate has grown since the measurement."""
        if not self._lr or self._lr == lr:
            return 1.0
        pairs = zip(lr, self._lr, strict=False)
        return max((now / then for now, then in pairs if then > 0), default=1.0)

    def at(self, lr: Sequence[float]) -> Estimate | None:
        """Return the margin at learning rates `lr`."""
        margin, ratio = self._margin, self.ratio(lr)
        if margin is None or margin.value is None or margin.error is None or ratio == 1:
            return margin
        return replace(margin, value=margin.value * ratio, error=margin.error * ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return the measurement and its learning rates."""
        return {
            "lr": list(self._lr),
            "margin": None if self._margin is None else asdict(self._margin),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the measurement and its learning rates."""
        self._lr = tuple(state["lr"])
        self._margin = None if state["margin"] is None else Estimate(**state["margin"])
