"""When to measure: what the schedule asks for, as far as it is affordable, alike on all ranks."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from geomwatch.monitoring.prober import Probed
from geomwatch.monitoring.safe_prober import Guard
from geomwatch.monitoring.schedule import make_schedule
from geomwatch.monitoring.second_look import SecondLook
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Estimate
from geomwatch.rules import Observation

_FOR_SENTINELS = 0.5  # of the time that probes may take, beside it
_ASKED_FOR_MORE = 100  # an `every` below this sets its own budget, and is what it costs
_WORK = 0.08  # steps' worth of sentinels and recurring probes, for each step taken,
_FULL_BATCH = 2.0  # times as much where every step sees the same data
_PROBE = 14.0  # steps' worth: what a recurring probe is taken to need
_JUMP = 2.0  # times the rate of the step before
_START, _BEYOND = 8, 1.0  # steps that are looked at; a margin beyond this is not let out of sight


class Pace:
    """Decides before each step whether a probe or a sentinel is due.

    Where `frugal`, an adaptive schedule is held to a share of the work of training, counted in
    gradients and products and not by the clock, to twice that where every step sees the same data;
    sentinels go ahead of probes. The first probe, those at a jump of the rate and those of a start
    beyond the limit are made in any case, and paid for by the ones to come. With `max_overhead` the
    clock decides instead, but for the sentinels of the start: half a dozen at most, before there is
    time to have a share of. A sentinel that sees much may call for a probe (`SecondLook`). `scale`
    is what a controller lets a step take of the user's rates `lr`: margins are judged as they are
    applied.
    """

    def __init__(
        self,
        schedule: str,
        every: int,
        guard: Guard,
        ranks: Ranks,
        *,
        max_overhead: float | None,
        frugal: bool,
        controlled: bool,
    ) -> None:
        self.every = every
        self.last_probe = -1  # its step
        self._jumped = False  # the rate, at the last step that was asked about
        self._schedule = make_schedule(schedule, every)
        self._second_look = SecondLook(controlled=controlled)
        self._guard, self._ranks = guard, ranks
        self._max_overhead = max_overhead
        self._counts_work = frugal
        self._lr: tuple[float, ...] = ()  # of the last call
        self._began = time.perf_counter()

    def probe_due(self, step: int, lr: Sequence[float], scale: float) -> bool:
        """Tell whether to probe before this step."""
        margin = _applied(self._guard.margin.at(lr), scale)
        ratio = self._guard.margin.growth(lr)
        due = self._schedule.due(step, lr_ratio=ratio, margin=margin)
        before, self._lr = self._lr, tuple(lr)
        self._jumped = any(now >= _JUMP * then > 0 for now, then in zip(lr, before, strict=False))
        urgent = self._jumped or (step <= _START and margin is not None and margin > _BEYOND)
        afforded = self._has_time_for_probes and (urgent or self._is_paid_for(step))
        return due and self._may(step, afforded)

    def glance_due(self, step: int, lr: Sequence[float], scale: float) -> bool:
        """Tell whether to look at the coming step where no probe is due."""
        margin = _applied(self._guard.margin.at(lr), scale)
        ratio = self._guard.gradient_margin.growth(lr)
        due = self._schedule.glance_due(step, lr_ratio=ratio, margin=margin)
        return due and self._may(step, step <= _START or self._has_time_for_sentinels)

    def second_look_due(self, step: Observation) -> bool:
        """Tell whether to probe after all, where a sentinel has just been."""
        due = self._guard.prober.plan.is_free and self._second_look.due(step)
        return due and self._may(step.index, self._has_time_for_probes)

    def noise_matters(self, step: int) -> bool:
        """Tell whether the probe that is due here is to measure what batches disagree on."""
        return self._jumped or self._second_look.at_start(step)

    def probed(self, step: int, probed: Probed | None, scale: float) -> None:
        """Take note of what a probe at the present rates has found, if it has."""
        margin = None if probed is None else probed.margin
        self._schedule.probed(step, margin=_applied(margin, scale))
        if probed is not None:
            self._second_look.probed(step, probed.record.lr, probed.record.estimates)

    def glanced(self, step: int, lr: Sequence[float], scale: float) -> None:
        """Take note of a sentinel."""
        margin = _applied(self._guard.gradient_margin.at(lr), scale)
        if margin is not None and self._guard.last is not None:
            margin /= self._guard.last.limit_ratio  # as the other margin counts
        self._schedule.glanced(step, margin=margin)

    def _may(self, step: int, has_time: bool) -> bool:
        if step <= self.last_probe:  # a skipped step is the same step
            return False
        return self._ranks.all(has_time and not self._guard.paused)

    def _is_paid_for(self, step: int) -> bool:
        if not self._counts_work or self._guard.last is None:
            return True
        # There the edge of stability is all there is to see, and sentinels look past it.
        more = _FULL_BATCH if self._guard.prober.same_data else 1.0
        return self._guard.work + _PROBE <= more * _WORK * step

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
        """Return the state of the schedule and the last rates."""
        return {
            "schedule": self._schedule.state_dict(),
            "second_look": self._second_look.state_dict(),
            "lr": list(self._lr),
        }

    def load_state_dict(self, state: dict[str, Any], *, step: int) -> None:
        """Take over the state of the schedule, at the step to come."""
        self._schedule.load_state_dict(state["schedule"])
        self._second_look.load_state_dict(state["second_look"])
        self._lr = tuple(state["lr"])
        self.last_probe = step - 1


def is_frugal(
    schedule: str, every: int, max_overhead: float | None, needed: Collection[str]
) -> bool:
    """Tell whether probes are held to a tenth of the work, as nobody needs or wants more."""
    is_asked_for = bool(needed) or every < _ASKED_FOR_MORE or max_overhead is not None
    return schedule == "adaptive" and not is_asked_for


def _applied(margin: Estimate | None, scale: float) -> float | None:
    return None if margin is None or margin.value is None else scale * margin.value
