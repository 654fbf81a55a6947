"""What geomwatch may spend of the time of training, and what it has spent: one account."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable

clock: Callable[[], float] = time.perf_counter  # looked up at each call: a test holds its own

DEFAULT_BUDGET: Final = 0.02  # where neither `every` nor `budget` is given; known by identity


@dataclass(frozen=True, kw_only=True)
class WorkUnits:
    """What a part of the watch is taken to cost, in training steps (decision 014).

    Used where a controller is at work, so that a run repeats itself whatever the clock says.
    """

    gradients: float = 2.0  # of a probe beside its products
    product: float = 2.2
    sentinel: float = 0.5
    rehearsed: float = 1.3  # a step of a rehearsal, which is a gradient and a step of training
    probe: float = 14.0  # a recurring one


class Account(Resumable):
    """Holds all that geomwatch spends to a share of the training it watches.

    Everything inside `Monitor.step` counts, the first probe included. By the clock: spent <=
    budget x (time since the first call - spent). Where a controller is at work (`counts_work`)
    both are counted in training steps instead. `share` is what was spent of the training so far.
    """

    work: Kept[float]
    steps: Kept[int]

    def __init__(
        self, budget: float | None, *, counts_work: bool, units: WorkUnits | None = None
    ) -> None:
        self.budget = budget
        self.units = units or WorkUnits()
        self.seconds = 0.0  # spent inside Monitor.step
        self.work = 0.0  # spent, in training steps
        self.steps = 0  # of the optimizer so far
        self._counts_work = counts_work
        self._began: float | None = None
        self._entered = 0.0  # the last call, and what was spent before it
        self._before = 0.0

    def enter(self, steps: int) -> None:
        """Count from here to `leave`, at a call of the monitor after so many optimizer steps."""
        self._entered, self._before = clock(), self.seconds
        if self._began is None:
            self._began = self._entered
        self.steps = steps

    def leave(self) -> None:
        """Note what the call has taken."""
        self.seconds += clock() - self._entered

    @property
    def training_seconds(self) -> float:
        """Time from the first call to the last that was not spent here."""
        if self._began is None:
            return 0.0
        return max(self._entered - self._began - self._before, 0.0)

    @property
    def share(self) -> float | None:
        """What was spent as a share of the time of training; None while there was none."""
        return self._share(self.seconds)

    @property
    def share_by_now(self) -> float | None:
        """The same with what the present call has taken so far."""
        return self._share(self.seconds + clock() - self._entered)

    def _share(self, spent: float) -> float | None:
        rest = self.training_seconds
        return spent / rest if rest > 0 else None

    def affords(self, worth: float = 0.0) -> bool:
        """Tell whether something may be measured now that is worth so many training steps."""
        if self.budget is None:
            return True
        if self._counts_work:
            return self.work + worth <= self.budget * self.steps
        return self.seconds <= self.budget * self.training_seconds


def check_pace(every: object, budget: object) -> None:
    """Refuse an interval or a share that has no meaning.

    Raises:
        UsageError: it has none.
    """
    is_number = isinstance(every, int) and not isinstance(every, bool)
    if every is not None and (not is_number or every < 1):  # type: ignore[operator]
        raise UsageError(
            f"every must be an integer >= 1, got {every!r}. It is the number of optimizer steps "
            "between two probes; leave it out to probe as often as the budget allows.",
            write="every=100",
        )
    if budget is None:
        return
    known = isinstance(budget, int | float) and not isinstance(budget, bool)
    if not known or not 0 < budget <= 1:  # type: ignore[operator]
        raise UsageError(
            f"budget must be a share of training time above 0 and up to 1, such as 0.05 for 5 %, "
            f"got {budget!r}. None sets no limit.",
            write=f"budget={_share(budget):g}",
        )


def _share(given: object) -> float:
    """Return the share that was probably meant: by 5 and "5%" 0.05, else the default."""
    text = str(given).strip()
    try:
        number = float(text.rstrip("%"))
    except ValueError:
        return DEFAULT_BUDGET
    share = number / 100 if text.endswith("%") or number > 1 else number
    return share if 0 < share <= 1 else DEFAULT_BUDGET


def budget_of(every: int | None, budget: float | None) -> float | None:
    """Return the budget in force: an `every` that is given alone is not held to the default."""
    check_pace(every, budget)
    return None if every is not None and budget is DEFAULT_BUDGET else budget
