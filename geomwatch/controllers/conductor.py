"""The conductor of controllers: observation and alerts -> adjustments -> actuators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from geomwatch.controllers.actuators import (
    BATCH,
    CLIP,
    KNOBS,
    LR,
    NO_BATCH,
    Actuator,
    LearningRate,
    Memory,
    StepClip,
)
from geomwatch.controllers.protocol import Controller, Knobs, Move, check_controllers
from geomwatch.errors import UsageError
from geomwatch.records import Adjustment, Alert, Effect, Estimate
from geomwatch.rules import Observation
from geomwatch.sinks import logger
from geomwatch.stability.problem import unwrap

_SAME = 1e-6  # relative: a knob that moves by less has not moved


class Control:
    """Asks each controller before each step, and turns the knobs once it is logged that they will.

    The learning rate comes first, then the batch, then clipping, each with one controller and at
    most one move a step. With `dry_run` no hook is set and nothing is turned. A knob that the loop
    can't turn while it runs becomes advice, given once. Without controllers it does nothing at all.

    Raises:
        UsageTypeError: a controller is none.
        UsageError: two controllers want the same knob, or one wants a knob that there is not.
    """

    def __init__(
        self, controllers: Sequence[Controller], optimizer: Any, *, dry_run: bool = False
    ) -> None:
        check_controllers(controllers)
        self._controllers = sorted(controllers, key=lambda c: KNOBS.index(c.knob))
        self._dry_run = dry_run
        self._rate: LearningRate | None = None
        self._actuators: dict[str, Actuator] = {
            c.knob: self._own_actuator(c, unwrap(optimizer)) for c in self._controllers
        }
        self._values: dict[str, float] = {}  # of the knobs at the last step, as trackers see them
        self._settings: dict[str, float] = {}  # as they were last asked for
        self._pending: list[Move] = []
        self._advised: set[str] = set()
        self._broken: set[str] = set()

    def equip(self, *actuators: Actuator) -> None:
        """Take the actuators of a host, in place of those of any loop; not in a dry run.

        What the user has passed for the batch stays where the host has nothing better.
        """
        for actuator in actuators:
            present = self._actuators.get(actuator.knob)
            if present is None or self._dry_run:
                continue
            if actuator.knob == BATCH and actuator.obstacle and not present.obstacle:
                continue
            present.close()
            self._actuators[actuator.knob] = actuator
            if actuator.knob in self._settings and not actuator.obstacle:
                actuator.set(self._settings[actuator.knob])

    def lift(self) -> None:
        """Show the user's own rates while the coming step is looked at."""
        if self._rate is not None:
            self._rate.lift()

    def __call__(self, step: Observation, alerts: Sequence[Alert]) -> list[Adjustment]:
        """Decide on one step; `apply` then turns the knobs."""
        self._pending = []
        adjustments: list[Adjustment] = []
        before = {knob: a.value(step.lr) for knob, a in self._actuators.items()} | self._values
        for controller in self._controllers:
            moved = frozenset(a.knob for a in adjustments if a.effect != "advice")
            for move in self._ask(controller, step, alerts, Knobs(before, moved)):
                adjustment = self._decided(move, step, before)
                if adjustment is not None:
                    adjustments.append(adjustment)
        return adjustments

    @property
    def scale(self) -> float:
        """The factor between the rates of the last step and the user's."""
        return 1.0 if self._dry_run else self._values.get(LR, 1.0)

    def as_applied(self, step: Observation) -> Observation:
        """Return what the rules should judge: the step as the cap known so far will have it."""
        if self._rate is None or self._dry_run:
            return step
        scale = self._rate.value(step.lr)
        headed = self._rate.value(step.peak)
        if scale == 1 and headed == 1:
            return step
        return replace(
            step,
            lr=tuple(scale * rate for rate in step.lr),
            peak=tuple(headed * rate for rate in step.peak),
            margin=_scaled(step.margin, scale),
            gradient_margin=_scaled(step.gradient_margin, scale),
        )

    def apply(self, rates: Sequence[float]) -> None:
        """Turn the knobs as decided, for a step at the user's learning `rates`."""
        for move in self._pending:
            self._settings[move.knob] = move.to
            self._actuators[move.knob].set(move.to)
        self._pending = []
        for actuator in self._actuators.values():
            actuator.refresh()
        self._values = {knob: a.value(rates) for knob, a in self._actuators.items()}

    def values(self, rates: Sequence[float]) -> dict[str, float]:
        """Return the knobs as they will be once the moves decided on are made."""
        present = {knob: a.value(rates) for knob, a in self._actuators.items()}
        return present | {m.knob: self._outcome(m, rates) for m in self._pending}

    def close(self) -> None:
        """Put the loop back as it was."""
        for actuator in self._actuators.values():
            actuator.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the memories of the controllers and where the knobs are."""
        return {
            "controllers": {c.knob: c.state_dict() for c in self._controllers},
            "settings": {k: v if math.isfinite(v) else None for k, v in self._settings.items()},
            "values": {k: v if math.isfinite(v) else None for k, v in self._values.items()},
            "advised": sorted(self._advised),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the memories and turn the knobs to where they were.

        Raises:
            UsageError: it was saved with other controllers.
        """
        own = [c.knob for c in self._controllers]
        if sorted(state["controllers"]) != sorted(own):
            raise UsageError(
                f"state must hold controllers of {own}, got {sorted(state['controllers'])}. Build "
                "the monitor with the controllers it was saved with."
            )
        for controller in self._controllers:
            controller.load_state_dict(state["controllers"][controller.knob])
        self._settings = {k: _number(v) for k, v in state["settings"].items()}
        self._values = {k: _number(v) for k, v in state["values"].items()}
        self._advised = set(state["advised"])
        for knob, setting in self._settings.items():
            self._actuators[knob].set(setting)

    def _own_actuator(self, controller: Controller, optimizer: Any) -> Actuator:
        """Return what turns a controller's knob in any torch loop."""
        if controller.knob == LR:
            self._rate = LearningRate(optimizer, live=not self._dry_run)
            return self._rate
        if self._dry_run:
            return Memory(controller.knob)
        if controller.knob == CLIP:
            return StepClip(optimizer)
        brought: Actuator | None = getattr(controller, "through", None)
        return brought or Memory(BATCH, obstacle=NO_BATCH)

    def _ask(
        self, controller: Controller, step: Observation, alerts: Sequence[Alert], knobs: Knobs
    ) -> Sequence[Move]:
        """Ask a controller; a bug in one must not stop a training run."""
        try:
            return controller(step, alerts, knobs)
        except Exception as error:  # whatever it raises
            if controller.knob not in self._broken:
                self._broken.add(controller.knob)
                logger.warning(
                    "%r failed with %s: %s. It leaves its knob where it is; training goes on, and "
                    "it will be asked again. This is said once.",
                    controller,
                    type(error).__name__,
                    error,
                    exc_info=error,
                )
            return ()

    def _decided(
        self, move: Move, step: Observation, before: dict[str, float]
    ) -> Adjustment | None:
        """Note a move to be made; return what to say of it, if anything."""
        actuator = self._actuators.get(move.knob)
        obstacle = "" if actuator is None else actuator.obstacle
        after, effect, reason = self._outcome(move, step.lr), self._effect, move.reason
        if move.advice or obstacle:
            key = move.reason if move.advice else move.knob
            if key in self._advised:
                return None
            self._advised.add(key)
            effect, reason = "advice", f"{reason}. {obstacle}" if obstacle else reason
        else:
            self._pending.append(move)
        was = before.get(move.knob, 1.0)  # advice may concern a knob that nobody turns
        if math.isclose(was, after, rel_tol=_SAME):
            return None
        return Adjustment(move.knob, was, after, reason, step.index, effect)

    @property
    def _effect(self) -> Effect:
        return "dry run" if self._dry_run else "applied"

    def _outcome(self, move: Move, rates: Sequence[float]) -> float:
        if move.knob != LR:
            return move.to
        largest = max(rates, default=0.0)
        return 1.0 if largest <= move.to else move.to / largest


def _scaled(margin: Estimate | None, factor: float) -> Estimate | None:
    if margin is None or margin.value is None:
        return margin
    error = None if margin.error is None else margin.error * factor
    return replace(margin, value=margin.value * factor, error=error)


def _number(value: float | None) -> float:
    return math.inf if value is None else value
