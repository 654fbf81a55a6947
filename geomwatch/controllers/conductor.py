"""The conductor of controllers: observation and alerts -> adjustments -> actuators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from geomwatch.controllers.actuators import (
    BATCH,
    CLIP,
    KNOBS,
    LR,
    NO_BATCH,
    SKIP,
    Actuator,
    LearningRate,
    Memory,
    StepClip,
)
from geomwatch.controllers.protocol import Controller, Knobs, Move, check_controllers
from geomwatch.controllers.withholding import StepSkip
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.margins import within
from geomwatch.observation.step import Observation
from geomwatch.records import Adjustment, Alert, Effect
from geomwatch.sinks.log import logger
from geomwatch.stability.registry import unwrap

_SAME = 1e-6  # relative: a knob that moves by less has not moved


class Conductor(Resumable):
    """Asks each controller before each step, and turns the knobs once it is logged that they will.

    The learning rate comes first, then the batch, then clipping, each with one controller and at
    most one move a step. For a controller with `dry_run` no hook is set and nothing is turned. A
    knob that the loop can't turn while it runs becomes advice, given once, and so does what a
    controller wants of another's knob. Without controllers it does nothing at all.

    Args:
        controllers: several, or one alone.
        optimizer: the optimizer of the loop, or a host's wrapper of it.

    Raises:
        UsageTypeError: a controller is none.
        UsageError: two controllers want the same knob, or one wants a knob that there is not.
    """

    _controllers: Kept[dict[str, Resumable]]  # by knob; a user's own may have no memory
    _settings: Kept[dict[str, float]]
    _values: Kept[dict[str, float]]
    _advised: Kept[set[str]]

    def __init__(self, controllers: Sequence[Controller] | Controller, optimizer: Any) -> None:
        asked = sorted(check_controllers(controllers), key=lambda c: KNOBS.index(c.knob))
        self._asked: list[Controller] = asked
        self._controllers = cast(dict[str, Any], {c.knob: c for c in asked})
        self._dry = {c.knob for c in asked if getattr(c, "dry_run", False)}
        self._actuators = {c.knob: self._own_actuator(c, unwrap(optimizer)) for c in asked}
        self._values: dict[str, float] = {}  # of the knobs at the last step, as trackers see them
        self._settings: dict[str, float] = {}  # as they were last asked for
        self._pending: list[Move] = []
        self._advised: set[str] = set()
        self._broken: set[str] = set()
        self._closed = False

    @property
    def turns(self) -> bool:
        """Whether it may turn a knob of its optimizer."""
        return not self._closed and len(self._dry) < len(self._asked)

    def follow(self, optimizer: Any) -> None:
        """Turn the knobs of another optimizer; what hangs on a host's own stays."""
        for controller in self._asked:
            present = self._actuators[controller.knob]
            if not isinstance(present, LearningRate | StepClip | StepSkip):
                continue
            present.close()
            self._actuators[controller.knob] = self._own_actuator(controller, unwrap(optimizer))
        self.resumed()

    @property
    def knobs(self) -> list[str]:
        """The knobs that its controllers turn."""
        return list(self._controllers)

    def equip(self, *actuators: Actuator) -> None:
        """Take the actuators of a host, in place of those of any loop; not in a dry run.

        What the user has passed for the batch stays where the host has nothing better.
        """
        for actuator in actuators:
            present = self._actuators.get(actuator.knob)
            if present is None or actuator.knob in self._dry:
                continue
            if actuator.knob == BATCH and actuator.obstacle and not present.obstacle:
                continue
            present.close()
            self._actuators[actuator.knob] = actuator
            if actuator.knob in self._settings and not actuator.obstacle:
                actuator.set(self._settings[actuator.knob])

    def lift(self) -> None:
        """Show the user's own rates while a step is looked at; forget what held for the last."""
        for actuator in self._actuators.values():
            actuator.lift()

    def __call__(self, step: Observation, alerts: Sequence[Alert]) -> list[Adjustment]:
        """Decide on one step; `apply` then turns the knobs."""
        self._pending = []
        adjustments: list[Adjustment] = []
        before = {knob: a.value(step.lr) for knob, a in self._actuators.items()} | self._values
        for controller in self._asked:
            knobs = self._seen_by(controller, before, adjustments)
            for move in self._ask(controller, step, alerts, knobs):
                adjustment = self._decided(controller, move, step, before)
                if adjustment is not None:
                    adjustments.append(adjustment)
        return adjustments

    @property
    def scale(self) -> float:
        """The factor between the rates of the last step and the user's."""
        return 1.0 if LR in self._dry else self._values.get(LR, 1.0)

    @property
    def cap(self) -> float:
        """The largest learning rate that a step is let take, by what is known so far."""
        rate = self._actuators.get(LR)
        return math.inf if rate is None or LR in self._dry else rate.setting

    @property
    def skips(self) -> bool:
        """Whether the coming step will be left out."""
        skip = self._actuators.get(SKIP)
        return skip is not None and skip.setting > 0 and SKIP not in self._dry

    def apply(self, rates: Sequence[float]) -> None:
        """Turn the knobs as decided, for a step at the user's learning `rates`."""
        for move in self._pending:
            self._actuators[move.knob].set(move.to)
            if move.knob != SKIP:  # which holds for one step
                self._settings[move.knob] = move.to
        self._pending = []
        for actuator in self._actuators.values():
            actuator.refresh()
        self._values = {knob: a.value(rates) for knob, a in self._actuators.items()}

    def values(self, rates: Sequence[float]) -> dict[str, float]:
        """Return the knobs as they will be once the moves decided on are made."""
        present = {knob: a.value(rates) for knob, a in self._actuators.items()}
        return present | {m.knob: _outcome(m, rates) for m in self._pending}

    def close(self) -> None:
        """Put the loop back as it was."""
        self._closed = True
        for actuator in self._actuators.values():
            actuator.close()

    def resumed(self) -> None:
        """Turn the knobs to where they were."""
        for knob, setting in self._settings.items():
            if knob in self._actuators:
                self._actuators[knob].set(setting)

    def _own_actuator(self, controller: Controller, optimizer: Any) -> Actuator:
        """Return what turns a controller's knob in any torch loop."""
        is_dry = controller.knob in self._dry
        if controller.knob == LR:
            return LearningRate(optimizer, live=not is_dry)
        if is_dry:
            return Memory(controller.knob)
        if controller.knob == CLIP:
            return StepClip(optimizer)
        if controller.knob == SKIP:
            return StepSkip(optimizer)
        brought: Actuator | None = getattr(controller, "through", None)
        return brought or Memory(BATCH, obstacle=NO_BATCH)

    def _seen_by(
        self, controller: Controller, before: Mapping[str, float], made: Sequence[Adjustment]
    ) -> Knobs:
        """Return where the knobs are; what a dry run would do exists for other dry runs alone."""
        hidden = set() if controller.knob in self._dry else self._dry
        moved = {a.knob for a in made if a.effect in ("applied", "dry run")}
        values = {knob: value for knob, value in before.items() if knob not in hidden}
        return Knobs(values, frozenset(moved - hidden))

    def _ask(
        self, controller: Controller, step: Observation, alerts: Sequence[Alert], knobs: Knobs
    ) -> Sequence[Move]:
        """Ask a controller; a bug in one must not stop a training run."""
        try:
            return controller(step, alerts, knobs)
        except Exception as error:  # whatever it raises
            if controller.knob not in self._broken:
                self._broken.add(controller.knob)
                said = (
                    "%r failed with %s: %s. It leaves its knob where it is; training goes on, and "
                    "it will be asked again. This is said once."
                )
                logger.warning(said, controller, type(error).__name__, error, exc_info=error)
            return ()

    def _decided(
        self, controller: Controller, move: Move, step: Observation, before: Mapping[str, float]
    ) -> Adjustment | None:
        """Note a move to be made; return what to say of it, if anything."""
        actuator = self._actuators.get(move.knob)
        obstacle = "" if actuator is None else actuator.obstacle
        after, reason = _outcome(move, step.lr), move.reason
        effect: Effect = "dry run" if controller.knob in self._dry else "applied"
        if move.abstains:
            if not self._is_new(f"abstains: {move.knob}"):
                return None
            self._pending += [move] if move.knob in self._settings else []
            reason = f"{type(controller).__name__} does nothing here: {reason}"
            return Adjustment(move.knob, after, after, reason, step.index, "abstains")
        if move.advice or obstacle or move.knob != controller.knob:
            if not self._is_new(move.reason if move.advice else move.knob):
                return None
            effect, reason = "advice", f"{reason}. {obstacle}" if obstacle else reason
        else:
            self._pending.append(move)
        # advice may concern a knob that nobody turns; a step is left out for itself alone
        was = 0.0 if move.knob == SKIP else before.get(move.knob, 1.0)
        if math.isclose(was, after, rel_tol=_SAME):
            return None
        return Adjustment(move.knob, was, after, reason, step.index, effect)

    def _is_new(self, said: str) -> bool:
        """Tell whether something is to be said, which is said once."""
        is_new = said not in self._advised
        self._advised.add(said)
        return is_new


def _outcome(move: Move, rates: Sequence[float]) -> float:
    """Return what a knob will say once the move is made, as trackers see it."""
    return within(move.to, rates) if move.knob == LR else move.to
