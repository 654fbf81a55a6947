"""What evaluating a loss changes that no probe can put back, found by evaluating it twice."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from geomwatch.curvature.objective import Objective
from geomwatch.curvature.subject import Subject
from geomwatch.isolation.marks import goes_on, marks
from geomwatch.isolation.outside import InUse, drawn_by_others
from geomwatch.isolation.random_state import RandomState
from geomwatch.isolation.signals import traceless
from geomwatch.isolation.undo import enter, later, until_here

_SAME = 1e-4  # relative; kernels that sum in any order differ by less
_REMEDY = (
    "Step aside in probes (`if geomwatch.is_probing(): ...`), or pass a loss_fn= that depends on "
    "the model and the batch alone."
)


class SideEffects(NamedTuple):
    """What evaluating a loss changes and a probe can't put back, and the loss before and after."""

    changed: list[str]
    first: float
    second: float

    def told(self) -> list[str]:
        """Say so, and what to do about it."""
        found = []
        if self.changed:
            names = ", ".join(map(repr, self.changed[:5])) + " and others" * bool(self.changed[5:])
            found.append(
                f"evaluating the loss changes {names}, which a probe can't put back: it goes on "
                f"with each evaluation. {_REMEDY}"
            )
        if not math.isclose(self.first, self.second, rel_tol=_SAME) and self.first == self.first:
            found.append(
                f"the loss is {self.first:.6g} and then {self.second:.6g} on the same batch, "
                "weights and random state: it goes by something that a probe can't put back, and "
                f"what is measured is not the loss that is trained on. {_REMEDY}"
            )
        return found


@traceless
def side_effects(subject: Subject, batch: Any) -> SideEffects:
    """Evaluate the loss of a batch twice, before anything else, and see what goes on with it.

    Each evaluation starts from the same weights, buffers and random state. What differs between
    the ends of the two goes on with each: an iterator, a file, a counter. Notes on the way which
    private generators the loss draws from, wherever they are kept, and which of the global ones
    only other threads draw from. Two forward passes, three where threads draw.
    """
    outside = subject.outside
    outside.is_known = True
    draws = outside.draws
    draws.by_others = drawn_by_others()  # seen to draw while the loss rests: nothing less will do
    window = [] if batch is None else [batch]
    with subject.set(micro_batch=None, precision="training").on(
        window, products=False
    ) as objective:
        start = RandomState()
        try:
            first, stand = _evaluated(objective, subject), marks(subject.model, subject.loss_fn)
            drawn = set(start.changed())
            second = _evaluated(objective, subject)
            drawn &= set(start.changed())
        except BaseException:
            draws.by_others.clear()  # so that all is put back
            raise
        if subject.ranks.any(bool(draws.by_others)) and first != second:
            # it draws from one of them, too
            draws.by_others.clear()
            second = _evaluated(objective, subject)
        # what has changed at a time, nobody knows why, is put back as if the loss had drawn
        draws.by_loss = (draws.by_loss | draws.by_whom | drawn) - draws.by_others
        draws.by_whom.clear()
        changed = goes_on(stand, marks(subject.model, subject.loss_fn))
    return SideEffects(changed, first, second)


def _evaluated(objective: Objective, subject: Subject) -> float:
    """Evaluate once more, from the state that everything had, and leave the one after it."""
    known = subject.outside.in_use
    with until_here():
        in_use = InUse()
        later(in_use.put_back)
        enter(in_use)
        loss = objective.value()
    known += [g for g in in_use.generators if not any(g is other for other in known)]
    return loss
