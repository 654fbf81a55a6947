"""Does something move with the weights that is constant for the gradient?"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from geomwatch.curvature.agreement import SLOPE, slope_error
from geomwatch.curvature.held import Held
from geomwatch.curvature.subject import Subject
from geomwatch.isolation.reach import captured_by
from geomwatch.vectors.layout import generator

FEW = 4  # items
_ASYMMETRY = 1e-2  # of differences in float32, which are good to 0.2 %


def no_spectrum_of_differences(subject: Subject, batch: Any) -> dict[str, str]:
    """Say that differences of gradients have no spectrum, if they have none.

    They are products with J, the gradient's Jacobian. Where part of the loss is constant for its
    gradient J sees it move; double backward, which gives the Hessian with that part held, may not
    be to be had here.
    """
    if not moves_constants(subject, batch):
        return {}
    where = " on a replica" if subject.layout.is_cut else ""
    return {
        "obstacle": "part of the loss is held constant for its gradient (detach(), no_grad(), a "
        "straight-through estimator), so that its differences have no real spectrum; "
        f"hvp='double_backward' measures the curvature with that part held{where}"
    }


def moves_constants(subject: Subject, batch: Any) -> bool:
    """Tell whether differences of gradients see something move that is constant for the gradient.

    Told by differences with that part held; on local shards, where hooks of FSDP can't be told from
    the loss, by the asymmetry of J: 1 - v'J(Jv) / ||Jv||^2 is 0 where J = J', and on average
    ||J - J'||^2 / 2 ||J||^2. On a few items of each rank, a gradient and two to six losses, and two
    HVPs where the loss has constants.
    """
    few = [] if batch is None else [subject.cutter.head(batch, FEW)]
    layout, subject = subject.layout, subject.set(micro_batch=None, hvp="finite_difference")
    v = layout.normal(generator(0))
    v = v / v.norm()
    try:
        if layout.is_cut:
            with subject.ranks.together():
                moves = _asymmetry(subject, few, v)
        elif few and subject.how.operator == "hessian":
            alone, held = subject.alone(), Held()
            with holding(alone, held).on(few) as objective:
                if slope_error(objective) > SLOPE:
                    return True
            if not held.anything:  # the loss has no constants
                return False
            moves = _shift_of_constants(alone, few, v)
        else:
            return False
    except Exception:  # which the probe will tell of
        return False
    return moves > _ASYMMETRY


def _asymmetry(subject: Subject, few: Sequence[Any], v: Tensor) -> float:
    with subject.on(few) as objective:
        jv = objective.hvp(v)
        size = float(jv.norm())
        return 1 - float(v @ objective.hvp(jv / size)) / size if size > 0 else 0.0


def _shift_of_constants(subject: Subject, few: Sequence[Any], v: Tensor) -> float:
    """Return how far J v is from the same with constants held, relative."""
    products = []
    for tested in (subject, holding(subject)):
        with tested.on(few) as objective:
            objective.gradient()
            products.append(objective.hvp(v))
    size = max(float(p.norm()) for p in products)
    return float((products[0] - products[1]).norm()) / size if size > 0 else 0.0


def holding(subject: Subject, held: Held | None = None) -> Subject:
    """Return the same loss with all that it takes for constant held."""
    also = (*subject.how.also, *captured_by(subject.loss_fn))
    loss_fn = functools.partial(held or Held(), subject.loss_fn)
    return replace(subject.set(also=also, hvp="finite_difference"), loss_fn=loss_fn)
