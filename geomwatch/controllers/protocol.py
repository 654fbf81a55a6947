"""What a controller is: what the rules see and say in, at most a few moves of a knob out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from geomwatch.controllers.actuators import KNOBS
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.records import Alert
from geomwatch.rules import Observation


@dataclass(frozen=True, slots=True)
class Move:
    """What a controller wants of a knob, and why.

    `to` is in the knob's own unit: the largest learning rate that a step may take, the multiple of
    the loop's own batch, the gradient norm to clip at; infinity, 1 and infinity leave the loop as
    the user wrote it. As `advice` it is said once and nothing is turned.
    """

    knob: str
    to: float
    reason: str
    advice: bool = False


@dataclass(frozen=True, slots=True)
class Knobs:
    """Where the knobs are, and which of them this step has moved already."""

    values: Mapping[str, float]  # as trackers see them: a factor of the rate, of the batch, a norm
    moved: frozenset[str] = frozenset()


class Controller(Protocol):
    """Asked before every step; whatever it remembers is counted in optimizer steps.

    It must decide from what it is passed alone: then all ranks decide alike, and a run that is
    resumed goes on as if it had not been interrupted.
    """

    knob: str

    def __call__(self, step: Observation, alerts: Sequence[Alert], knobs: Knobs) -> Sequence[Move]:
        """Look at one step and the alerts it has raised, before it is taken."""

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of the controller as primitives."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the memory."""


def copies(controllers: Sequence[Controller]) -> list[Controller]:
    """Return controllers of the same settings and memory, for another monitor or run.

    What they turn the batch `through` stays the loop's own.
    """
    kept = {id(t): t for c in controllers if (t := getattr(c, "through", None)) is not None}
    return copy.deepcopy(list(controllers), kept)


def check_controllers(controllers: Sequence[Controller]) -> None:
    """Refuse what is no controller, and two that would fight over a knob."""
    for controller in controllers:
        if not callable(controller) or not hasattr(controller, "knob"):
            raise UsageTypeError(
                f"controllers must hold controllers such as LearningRateCap(), got {controller!r}."
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


def check_above(name: str, value: object, least: float, *, inclusive: bool = False) -> None:
    """Refuse what is not a finite number above `least`."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if known and (value > least or (inclusive and value == least)):  # type: ignore[operator]
        return
    wanted = f"{'at least' if inclusive else 'above'} {least:g}"
    raise UsageError(f"{name} must be a number {wanted}, got {value!r}.")


def check_share(name: str, value: object) -> None:
    """Refuse what is not a number in (0, 1)."""
    if not isinstance(value, float | int) or isinstance(value, bool) or not 0 < value < 1:
        raise UsageError(f"{name} must be a number between 0 and 1, got {value!r}.")
