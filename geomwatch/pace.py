"""When to measure: what the schedule asks for, as far as time allows, alike on all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from geomwatch.distributed import Ranks
from geomwatch.guard import Guard
from geomwatch.records import Estimate
from geomwatch.schedule import make_schedule

_FOR_SENTINELS = 0.5  # of the time that probes may take, beside it


class Pace:
    """Decides before each step whether a probe or a sentinel is due.

    `scale` is what a controller lets a step take of the user's rates `lr`: margins are judged as
    they are applied. Without `max_overhead` the clock plays no part.
    """

    def __init__(
        self, schedule: str, every: int, guard: Guard, ranks: Ranks, max_overhead: float | None
    ) -> None:
        self.every = every
        self.last_probe = -1  # its step
        self._schedule = make_schedule(schedule, every)
        self._guard, self._ranks = guard, ranks
        self._max_overhead = max_overhead
        self._began = time.perf_counter()

    def probe_due(self, step: int, lr: Sequence[float], scale: float) -> bool:
        """Tell whether to probe before this step."""
        margin = _applied(self._guard.margin.at(lr), scale)
        ratio = self._guard.margin.ratio(lr)
        due = self._schedule.due(step, lr_ratio=ratio, margin=margin)
        return due and self._may(step, self._has_time_for_probes)

    def glance_due(self, step: int, lr: Sequence[float], scale: float) -> bool:
        """Tell whether to look at the coming step where no probe is due."""
        margin = _applied(self._guard.margin.at(lr), scale)
        ratio = self._guard.gradient_margin.ratio(lr)
        due = self._schedule.glance_due(step, lr_ratio=ratio, margin=margin)
        return due and self._may(step, self._has_time_for_sentinels)

    def probed(self, step: int, margin: Estimate | None, scale: float) -> None:
        """Take note of the margin a probe at the present rates has found."""
        self._schedule.probed(step, margin=_applied(margin, scale))

    def glanced(self, step: int, lr: Sequence[float], scale: float) -> None:
        """Take note of a sentinel."""
        margin = _applied(self._guard.gradient_margin.at(lr), scale)
        if margin is not None and self._guard.last is not None:
            margin /= self._guard.last.noise_ratio  # as the other margin counts
        self._schedule.glanced(step, margin=margin)

    def _may(self, step: int, has_time: bool) -> bool:
        if step <= self.last_probe:  # a skipped step is the same step
            return False
        return self._ranks.all(has_time and not self._guard.paused)

    @property
    def _has_time_for_probes(self) -> bool:
        guard = self._guard
        return self._has_time(guard.seconds - guard.glance_seconds, 1.0)

    @property
    def _has_time_for_sentinels(self) -> bool:
        return self._has_time(self._guard.glance_seconds, _FOR_SENTINELS)

    def _has_time(self, spent: float, share: float) -> bool:
        if self._max_overhead is None or self._guard.last is None:
            return True
        rest = time.perf_counter() - self._began - self._guard.seconds
        return spent <= share * self._max_overhead * rest

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None:
        """Take over the state of the schedule, at the step to come."""
        self._schedule.load_state_dict(state)
        self.last_probe = step - 1


def _applied(margin: Estimate | None, scale: float) -> float | None:
    return None if margin is None or margin.value is None else scale * margin.value
