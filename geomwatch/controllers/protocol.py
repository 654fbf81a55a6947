"""What a controller is: what the rules see and say in, at most a few moves of a knob out."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from geomwatch.controllers.actuators import KNOBS, NEUTRAL
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.observation.step import Observation
from geomwatch.records import Alert

_OURS = (
    "LearningRateCap",
    "BatchSizeScaler",
    "GradientClipper",
    "SkipStep",
)  # for who passes a name


@dataclass(frozen=True, slots=True)
class Move:
    """What a controller wants of a knob, and why.

    `to` is in the knob's own unit: the largest learning rate that a step may take, the multiple of
    the loop's own batch, the gradient norm to clip at; infinity, 1 and infinity leave the loop as
    the user wrote it. As `advice` it is said once and nothing is turned; so is the reason why a
    controller `abstains`.
    """

    knob: str
    to: float
    reason: str
    advice: bool = False
    abstains: bool = False


def abstained(knob: str, reason: str) -> tuple[Move]:
    """Return the move of a controller that can't work in this run: the loop is left as it is."""
    return (Move(knob, NEUTRAL[knob], reason, abstains=True),)


@dataclass(frozen=True, slots=True)
class Knobs:
    """Where the knobs are, and which of them this step has moved already."""

    values: Mapping[str, float]  # as trackers see them: a factor of the rate, of the batch, a norm
    moved: frozenset[str] = frozenset()


class Controller(Protocol):
    """Asked before every step; whatever it remembers is counted in optimizer steps.

    It must decide from what it is passed alone: then all ranks decide alike, and a run that is
    resumed goes on as if it had not been interrupted. It may also have

    - `dry_run`: if true its moves are logged as what would be done, and nothing is turned,
    - `needs`: names of quantities to be measured at every probe,
    - `through`: the `Actuator` that turns its knob, where the loop has none,
    - `state_dict()` and `load_state_dict(state)`, as a `Resumable` has them: its memory.
    """

    @property
    def knob(self) -> str:
        """The knob it turns, one of `KNOBS`."""

    def __call__(self, step: Observation, alerts: Sequence[Alert], knobs: Knobs) -> Sequence[Move]:
        """Look at one step and the alerts it has raised, before it is taken."""


def copies(controllers: Sequence[Controller] | Controller) -> list[Controller]:
    """Return controllers of the same settings and memory, for another monitor or run.

    What they turn the batch `through` stays the loop's own.
    """
    several = check_controllers(controllers)
    kept = {id(t): t for c in several if (t := getattr(c, "through", None)) is not None}
    return copy.deepcopy(list(several), kept)


def check_controllers(given: Sequence[Controller] | Controller) -> tuple[Controller, ...]:
    """Return what was passed as `controllers`, several or one alone.

    Raises:
        UsageTypeError: one is no controller; the last line of the message is the repaired code.
        UsageError: one has a knob that there is not, or two would fight over the same.
    """
    is_one = isinstance(given, str) or hasattr(given, "knob")
    controllers: tuple[Any, ...] = (
        tuple(given) if isinstance(given, Iterable) and not is_one else (given,)
    )
    for controller in controllers:
        if isinstance(controller, type) or not (
            callable(controller) and hasattr(controller, "knob")
        ):
            repaired = ", ".join(map(_repaired, controllers))
            raise UsageTypeError(
                f"controllers must hold controllers such as LearningRateCap(), got {controller!r}.",
                write=f"controllers={repaired if len(controllers) == 1 else f'[{repaired}]'}",
            )
        if controller.knob not in KNOBS:
            raise UsageError(
                f"a controller's knob must be one of {', '.join(KNOBS)}, got {controller.knob!r}."
            )
    knobs = [c.knob for c in controllers]
    for knob in knobs:
        if knobs.count(knob) > 1:
            raise UsageError(
                f"controllers must hold one for each knob, got {knobs.count(knob)} for {knob!r}: "
                "they would fight. Leave one of them."
            )
    return controllers


def _repaired(given: object) -> str:
    """Return the code of what was probably meant."""
    if isinstance(given, type) and hasattr(given, "knob"):
        return f"{given.__name__}()"
    if hasattr(given, "knob"):
        shown = repr(given)
        return f"{type(given).__name__}(...)" if shown.startswith("<") else shown
    near = difflib.get_close_matches(str(given), _OURS, 1, cutoff=0.3)
    return f"{near[0] if near else _OURS[0]}()"
