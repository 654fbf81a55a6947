"""Steps at which nothing is due: noted one by one, and shown to the rules together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from geomwatch.monitoring.scalars import Noted
from geomwatch.observation.findings import Present
from geomwatch.observation.step import Settled
from geomwatch.rules.calm import Calm


class Backlog:
    """Holds steps that may wait, since no rule has anything to say of their losses at once.

    What rules cost in a training loop is mostly that their code has left the processor's caches
    since the step before. So most steps take one comparison of integers and one of the loss with
    what rules call calm, and rules see some ten steps in a row, as they were. A loss that is not
    calm is shown at once, after those before it.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer  # whose rates are to stay
        self.steps: list[Noted] = []
        self.close()

    def open(self, last: Noted, until: float, calm: Calm, rates: Sequence[float]) -> None:
        """Let the steps after the `last` one wait, at the same rates: those before `until`.

        Not where its own loss or norm is not calm, of which most rules hear at the next step.
        """
        self._until, self._calm, self._rates = until, calm, list(rates)
        self._first = self._last = last
        self._next = last.step + 1 if self._is_calm(last) else -1

    def close(self) -> None:
        """Let none wait."""
        self._next = -1

    def drained(self) -> list[tuple[Settled, Present]]:
        """Return what is known of each step that has waited and of the one before; forget them."""
        if not self.steps:
            return []
        steps, self.steps = [self._first, *self.steps], []
        self._first = steps[-1]
        return [(before.settled(now.step), now.present()) for before, now in pairwise(steps)]

    def may_take(self, step: int) -> bool:
        """Tell whether a step is the one after the last, at the same rates."""
        if step != self._next or step >= self._until:
            return False
        return [group.get("lr") for group in self.optimizer.param_groups] == self._rates

    def take(self, now: Noted) -> bool:
        """Note a step if its loss and its gradient's norm are calm, and tell whether they are.

        Of scalars that are on their way those of the step before are looked at, which are here.
        """
        if type(now.loss) is not float:
            before = self._last.settled(now.step)
            if not self._calm.holds(before.loss, before.grad_norm):
                return False
        if not self._is_calm(now):
            return False
        self._next, self._last = now.step + 1, now
        self.steps.append(now)
        return True

    def _is_calm(self, noted: Noted) -> bool:
        loss, norm = noted.loss, noted.grad_norm
        if isinstance(loss, float) and (norm is None or isinstance(norm, float)):
            return self._calm.holds(loss, norm)
        present = noted.present()
        return self._calm.holds(present.loss, present.grad_norm)
