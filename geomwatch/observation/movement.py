"""How far weights have moved over some steps, by a sample of their entries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Movement:
    """What became of sampled entries whose gradient was not zero, over the last `steps` steps."""

    steps: int
    still: float  # the share of them that has not changed by a bit
    relative: float  # norm of the change of all over the norm of the weights
    dtype: str  # of most of them
    rate: float  # the largest one when they were sampled
