"""The learning rates that suit each task, derived from the ladder that calibrate.py has climbed."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tasks.task import Task

PATH = Path(__file__).with_name("rates.json")
FAILED = 1 / 3  # of what can be learnt, left at the end
_EQUAL = 2e-4  # of what can be learnt: 0.0005 nats of ten classes, far below what anyone tunes for

Tried = Mapping[float, Sequence[float]]  # rate -> final training losses, one a seed


@dataclass(frozen=True)
class Rates:
    """`tuned` trains best at a constant rate, `breaks` is the smallest one above that fails.

    Of rates that train equally well, `tuned` is the smallest. `floor` is its final training loss,
    `chance` that of a net that has learnt nothing: the units in which other runs of the task are
    called good or bad. `seconds` is what a run took where it was calibrated, on one thread.
    """

    tuned: float
    breaks: float
    floor: float
    chance: float
    seconds: float

    def lost(self, loss: float) -> float:
        """Return which share of what can be learnt is not: 0 at the floor, 1 at chance."""
        return (loss - self.floor) / (self.chance - self.floor)


def key(task: str, optimizer: str, batch: int | None) -> str:
    """Return the name under which a combination is kept."""
    return f"{task} {optimizer} {'full' if batch is None else batch}"


@functools.cache
def rates(task: Task, optimizer: str, batch: int | None) -> Rates:
    """Look the rates of a combination up.

    Raises:
        KeyError: it has not been calibrated.
    """
    name = key(task.name, optimizer, batch)
    if name not in load():
        raise KeyError(
            f"no learning rates are known for {name!r}. Add it to COMBINATIONS in "
            "benchmarks/tasks/calibrate.py and run that."
        )
    seconds, tried = load()[name]
    return derive(tried, task.chance(), seconds)


def derive(tried: Tried, chance: float, seconds: float = 0.0) -> Rates:
    """Find tuned and breaking rate among those tried.

    Raises:
        ValueError: none above the tuned one fails.
    """
    mean = {rate: statistics.fmean(losses) for rate, losses in tried.items()}
    lowest = min(mean.values())
    tuned = min(r for r, loss in mean.items() if loss <= lowest + _EQUAL * (chance - lowest))
    failing = [r for r in tried if r > tuned and fails(tried[r], lowest, chance)]
    if not failing:
        raise ValueError(f"a rate that fails must be among those tried, got {sorted(tried)}")
    return Rates(tuned, min(failing), mean[tuned], chance, seconds)


def fails(losses: Sequence[float], floor: float, chance: float) -> bool:
    """Tell whether a seed is left with more than a third of what can be learnt."""
    return not max(losses) < floor + FAILED * (chance - floor)


@functools.cache
def load() -> dict[str, tuple[float, Tried]]:
    """Read (seconds a run, rates tried) of each combination; nothing before the first one."""
    raw = json.loads(PATH.read_text()) if PATH.exists() else {}
    return {
        name: (
            entry["seconds"],
            {
                float(rate): [math.inf if x is None else x for x in losses]
                for rate, losses in entry["tried"].items()
            },
        )
        for name, entry in raw.items()
    }
