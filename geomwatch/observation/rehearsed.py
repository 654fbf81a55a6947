"""What some steps ahead over the last batches have shown, and how to ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """The next `steps` steps over the last batches at `multiple` times the rates of this one.

    `rise` is by how much they raise the loss of the last quarter of these batches, as a share of
    the range that the smoothed loss of the run has covered: 0.5 loses half of what was learnt.
    """

    multiple: float
    rise: float
    steps: int


class Rehearsals(Protocol):
    """Answers of a rehearsal, for rules that are about to speak; None where there can't be one."""

    def __call__(self, multiple: float | None = None) -> Rehearsed | None:
        """Go some steps ahead at a multiple of the rates of this step.

        By default at that which the run is headed for: 1 where the rate does not rise, else 2, or
        less where the schedule shows its peak.
        """

    def hindsight(self) -> float | None:
        """Return how the loss of the last batches has changed since the run has seen them.

        The mean over them of the loss at the present weights minus the loss then, in its own
        standard errors; infinite where it is not finite.
        """


@dataclass(frozen=True, slots=True)
class NoRehearsals:
    """Where nobody can be asked."""

    def __call__(self, multiple: float | None = None) -> Rehearsed | None:
        """Know nothing."""
        return None

    def hindsight(self) -> float | None:
        """Know nothing."""
        return None


NO_REHEARSALS = NoRehearsals()
