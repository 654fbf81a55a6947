"""What a step that was taken did to the loss of its own batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Taken:
    """L(w) and L(w + u) of the step's own batch, u the update that was really taken."""

    step: int
    before: float
    after: float
    predicted: float  # what the loss would have fallen by on a straight line, -g'u

    @property
    def rise(self) -> float:
        """By how much the step raised the loss of its own batch; below 0 where it lowered it."""
        return self.after - self.before
