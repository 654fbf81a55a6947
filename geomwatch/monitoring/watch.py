"""The looks at a run: due? -> probe or sentinel -> what is known of the coming step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.budget import Account
from geomwatch.monitoring.heartbeat import Heartbeat
from geomwatch.monitoring.probed import Measures, Probed
from geomwatch.monitoring.rehearser import Asked, Rehearser
from geomwatch.monitoring.safe_prober import SafeProber
from geomwatch.monitoring.schedule import Cadence, Look, Schedule
from geomwatch.monitoring.second_look import SecondLook
from geomwatch.observation.findings import Findings, Present, nothing_found
from geomwatch.observation.movement import Movement
from geomwatch.observation.rehearsed import Rehearsed
from geomwatch.observation.step import Observation, Settled
from geomwatch.observation.taken import Taken
from geomwatch.records import Estimate, Record
from geomwatch.sinks.log import logger
from geomwatch.stability.problem import cold_start, planned_rates, unwrap
from geomwatch.stability.registry import is_adaptive, optimizer_name, sets_rate
from geomwatch.vectors.layout import Layout

_NO_BATCH = (
    "step() has no batch to probe on, so nothing is measured. Pass it as step(batch), or call "
    "observe(batch) for each micro-batch."
)


@dataclass(frozen=True, slots=True)
class Coming:
    """The coming step, as it is known before it is looked at."""

    index: int  # optimizer steps taken
    lr: tuple[float, ...]  # the user's rates
    scale: float  # what a controller lets it take of them
    settled: Settled | None  # what became of the step before
    present: Present | None = None  # what the host knows of this one
    movement: Movement | None = None  # what became of the weights
    inspect: Callable[..., Findings] = nothing_found  # looks for what is wrong with it
    taken: Taken | None = None  # what the step before did to its own loss
    rehearsed: tuple[Rehearsed, ...] = ()  # what some steps ahead have shown


class Watch(Resumable):
    """Looks at the steps that are due for it, and keeps what it has seen for those between."""

    schedule: Kept[Schedule]
    _second_look: Kept[SecondLook]
    prober: Kept[SafeProber]
    _rehearser: Kept[Rehearser]
    _began: Kept[int]
    _unseen: Kept[str]

    def __init__(
        self, prober: Measures, account: Account, every: int | None, *, controlled: bool
    ) -> None:
        self.schedule = Schedule(every, account, prober.ranks)
        self._second_look = SecondLook(controlled=controlled)
        self.prober = SafeProber(prober, account)
        self._rehearser = Rehearser()
        self._asked = Asked(self._rehearser)
        self._ranks, self._optimizer = prober.ranks, prober.optimizer
        self._name = optimizer_name(prober.optimizer)
        self._adaptive = is_adaptive(unwrap(prober.optimizer))
        self._controlled = controlled
        self._heartbeat = Heartbeat(Cadence.calm)
        self._unseen = ""  # why the last look has found no margin
        self._began = 0  # the step from which on the optimizer is this one

    def restart(self, layout: Layout, optimizer: Any, step: int) -> None:
        """Go on with other parameters or another optimizer; the next look is a probe."""
        if optimizer is not self._optimizer:
            self._began = step
        self._optimizer, self._name = optimizer, optimizer_name(optimizer)
        self._adaptive = is_adaptive(unwrap(optimizer))
        self._unseen = ""
        self._second_look = SecondLook(controlled=self._controlled)
        self.schedule.restart()
        self._rehearser.restart()
        self.prober.restart(layout, optimizer)

    def due(self, step: Coming) -> Look:
        """Say what is due before a step."""
        prober, schedule = self.prober, self.schedule
        if schedule.is_quiet(step.index, step.lr):
            return "nothing"
        is_off = prober.is_off(step.index)
        if is_off and self._ranks.size == 1:
            return "nothing"
        due = schedule.look(
            step.index,
            step.lr,
            margin=prober.margin_at(step.lr, step.scale),
            growth=prober.margin.growth(step.lr),
            growth_along=prober.gradient_margin.growth(step.lr),
        )
        # A pause on one rank is one for all.
        return "nothing" if due == "nothing" or self._ranks.any(is_off) else due

    def look(
        self, due: Look, step: Coming, window: Sequence[Any], known: dict[str, Any]
    ) -> tuple[Probed | None, bool]:
        """Do what is due: a probe, a sentinel, both where the one calls for the other, or nothing.

        Returns what a probe has found, and whether a sentinel has.
        """
        probed, looked = self._looked(due, step, window, known)
        measured = looked or (probed is not None and probed.gradient_margin.value is not None)
        if due != "nothing":
            self._unseen = "" if measured else self.prober.why
        self.beat(step.index, measured=measured)
        return probed, looked

    def beat(self, index: int, *, measured: bool) -> None:
        """Take note of a call, and say so if nothing could be measured for long."""
        if self._heartbeat.beat(index, usable=measured or self.prober.paused):
            logger.warning("%s", self._words())

    def _words(self) -> str:
        return self.prober.addressed(self._heartbeat.words(self.prober.why))

    def keep(self, index: int, rates: Sequence[float], window: Sequence[Any]) -> None:
        """Keep the batches of a step, by reference, for a rehearsal."""
        self._rehearser.keep(index, rates, window)

    def learn(self, settled: Settled | None) -> None:
        """Take note of the loss of a step that is over."""
        if settled is not None and settled.loss is not None:
            self._rehearser.learn(settled.step, settled.loss)

    def rehearse(self, step: Coming, window: Sequence[Any], known: dict[str, Any]) -> Coming:
        """Go some steps ahead where the rate has grown.

        Where no limit is within reach, at the rate that the run is headed for, nobody need ask.
        """
        if self.prober.paused:
            self._asked.set(None, None, ())
            return step
        rehearser = self._rehearser
        self.keep(step.index, step.lr, window)
        self.learn(step.settled)
        passed = {name: known[name] for name in ("grad_norm", "grad_scale")}
        ahead = partial(self.prober.ahead, scale=step.scale, **passed)
        peak = planned_rates(self._optimizer, step.lr) if rehearser.is_ready else ()
        self._asked.set(ahead, self.prober.present, peak)
        if not rehearser.due() or self.prober.why_not_ahead:
            return step
        headed = rehearser.headed(peak)
        if self._is_far_off(step, headed):
            return step
        return replace(step, rehearsed=rehearser.ahead(ahead, (headed,)))

    def headroom(self, most: float) -> Estimate:
        """Return the largest multiple of the present rates that steps ahead survive."""
        found = self._asked.headroom(most)
        why = self.prober.why_not_ahead
        return replace(found, reason=why) if found.value is None and why else found

    def _is_far_off(self, step: Coming, multiple: float) -> bool:
        """Tell whether margins are below every limit at a multiple of the rates."""
        prober = self.prober
        known = (prober.margin.at(step.lr), prober.gradient_margin.at(step.lr))
        values = [m.value for m in known if m is not None and m.status == "ok"]
        return len(values) == len(known) and all(
            value is not None and step.scale * multiple * value < 1 for value in values
        )

    def end(self) -> None:
        """Say why, if the run ends without a margin."""
        if self._heartbeat.ends_blind() and not self.prober.paused:
            logger.warning("at the end: %s", self._words())

    def _looked(
        self, due: Look, step: Coming, window: Sequence[Any], known: dict[str, Any]
    ) -> tuple[Probed | None, bool]:
        prober, schedule = self.prober, self.schedule
        if due == "nothing":
            return None, False
        if not self._ranks.any(bool(window)):
            if due == "probe":
                prober.tell(_NO_BATCH)
            return None, False
        if due == "probe":
            noise = schedule.jumped or self._second_look.at_start(step.index)
            return self._probe(step, window, known, noise=noise), False
        seen = prober.glance(window, step.index, step.lr, **known)
        schedule.looked(step.index, prober.margin_along(step.lr, step.scale))
        if seen and self._calls_for_a_probe(step):
            return self._probe(step, window, known, noise=True), True
        return None, seen

    def observation(self, step: Coming, record: Record | None, *, looked: bool) -> Observation:
        """Return what rules and controllers see of a step."""
        prober = self.prober
        last = prober.last
        return Observation(
            index=step.index,
            lr=step.lr,
            optimizer=self._name,
            margin=prober.margin.at(step.lr),
            fresh=record is not None,
            gradient_margin=prober.gradient_margin.at(step.lr),
            gradient_fresh=looked or record is not None,
            cold_start=cold_start(self._optimizer, step.index - self._began),
            adaptive=self._adaptive,
            sets_rate=sets_rate(self._optimizer),
            limit_ratio=prober.limit_ratio,
            peak=planned_rates(self._optimizer, step.lr),
            same_data=prober.same_data,
            estimates=record.estimates if record is not None else None,
            provenance=record.provenance if record is not None else None,
            loss=record.loss if record is not None else None,
            items=last.items if last is not None else 0,
            layers=last.layers if last is not None else (),
            settled=step.settled,
            present=step.present,
            taken=step.taken,
            movement=step.movement,
            inspect=step.inspect,
            unseen=self._unseen,
            rehearsed=step.rehearsed,
            rehearsals=self._asked,
        )

    def _calls_for_a_probe(self, step: Coming) -> bool:
        """Tell whether what a sentinel has just seen makes a probe worth its price."""
        is_free = self.prober.plan.is_free
        due = is_free and self._second_look.due(self.observation(step, None, looked=True))
        return self._ranks.all(due)

    def _probe(
        self, step: Coming, window: Sequence[Any], known: dict[str, Any], *, noise: bool
    ) -> Probed | None:
        probed = self.prober.probe(window, step.index, noise=noise, **known)
        margin = None if probed is None or probed.margin is None else probed.margin.value
        self.schedule.probed(step.index, None if margin is None else step.scale * margin)
        if probed is not None:
            self._second_look.probed(step.index, probed.record.lr, probed.record.estimates)
        return probed
