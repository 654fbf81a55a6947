"""A user who follows the advice of an alert: lowers the rate to what it says, or starts again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

_RATE = re.compile(r"about ([0-9.]+(?:e[+-]?[0-9]+)?) \(")
_AGAIN = re.compile(r"\bstart again\b", re.IGNORECASE)


def advised_rate(alert: dict[str, Any]) -> float | None:
    """Return the learning rate that a warning or critical alert says to go down to, if any."""
    found = _RATE.search(alert["message"])
    return float(found[1]) if found and alert["severity"] != "info" else None


class Obedience:
    """Holds the rate at or below what the alerts so far have advised.

    The scheduler keeps its own rate: it is put back after each step, before the scheduler moves.
    `caps` are those of earlier attempts; `wants_again` when an alert has said to start again.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, caps: Sequence[tuple[int, float]] = ()
    ) -> None:
        self._optimizer = optimizer
        self._planned: list[float] = []  # by the scheduler for this step, a group each
        self.caps = list(caps)  # (step, rate) of each time it went down
        self.wants_again = False
        optimizer.register_step_post_hook(lambda *_: self._put_back())

    def hear(self, step: int, alert: dict[str, Any]) -> None:
        """Take an alert's advice, when it asks for a lower rate than so far."""
        rate = advised_rate(alert)
        if rate is not None and rate < self._cap:
            self.caps.append((step, rate))
            self.wants_again |= bool(_AGAIN.search(alert["message"]))

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
