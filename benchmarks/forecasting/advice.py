"""A user who follows the advice of an alert: lowers the learning rate to what it says, at once."""

from __future__ import annotations

import re
from typing import Any

import torch

_RATE = re.compile(r"to about ([0-9.]+(?:e[+-]?[0-9]+)?)")


def advised_rate(alert: dict[str, Any]) -> float | None:
    """Return the learning rate that a warning or critical alert says to go down to, if any."""
    found = _RATE.search(alert["message"])
    return float(found[1]) if found and alert["severity"] != "info" else None


class Obedience:
    """Holds the rate at or below what the alerts so far have advised.

    The scheduler keeps its own rate: it is put back after each step, before the scheduler moves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._planned: list[float] = []  # by the scheduler for this step, a group each
        self.caps: list[tuple[int, float]] = []  # (step, rate) of each time it went down
        optimizer.register_step_post_hook(lambda *_: self._put_back())

    def hear(self, step: int, alert: dict[str, Any]) -> None:
        """Take an alert's advice, when it asks for a lower rate than so far."""
        rate = advised_rate(alert)
        if rate is not None and rate < self._cap:
            self.caps.append((step, rate))

    def apply(self) -> None:
        """Lower the rates of the coming step."""
        groups = self._optimizer.param_groups
        if not self._planned:
            self._planned = [group["lr"] for group in groups]
        for group, planned in zip(groups, self._planned, strict=True):
            group["lr"] = min(planned, self._cap)

    @property
    def _cap(self) -> float:
        return self.caps[-1][1] if self.caps else float("inf")

    def _put_back(self) -> None:
        for group, planned in zip(self._optimizer.param_groups, self._planned, strict=True):
            group["lr"] = planned
        self._planned = []
