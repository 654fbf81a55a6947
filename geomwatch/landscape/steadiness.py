"""Whether a loss is a function of the weights: the same at the same point each time."""

from __future__ import annotations

from typing import Any

from geomwatch.curvature.objective import Objective
from geomwatch.landscape.evaluator import same


def steadiness(objective: Objective) -> dict[str, Any]:
    """Evaluate the loss twice at the weights; return whether it is the same, or by how much not.

    A generator of its own, or other data at each call, makes curvature a matter of chance. Two
    forward passes.
    """
    here = objective.layout.zeros()
    first, again = objective.loss_at(here), objective.loss_at(here)
    if same(first, again):
        return {"deterministic": True}
    return {"deterministic": False, "repeat_difference": abs(again - first)}
