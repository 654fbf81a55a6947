"""Whether a loss is smooth enough for one-sided differences, which cost one gradient a product."""

from __future__ import annotations

from typing import Any

import torch

from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import check_micro_batches, check_own_loss, choose_backend
from geomwatch.vectors.fsdp import is_sharded
from geomwatch.vectors.layout import generator

# Two steps, h and h / 4, of a smooth loss differ by their truncation, some 1e-3; across kinks by
# 1 and more. Between them lies room of two decades.
_SMOOTH = 3e-2

Facts = dict[str, str | int | float | bool]


def choose_products(bends: dict[str, float], subject: Subject, batch: Any) -> tuple[Subject, Facts]:
    """Choose how products are computed in a run: by the cheapest right way.

    One-sided differences where no function with kinks is in the loss and two steps along a random
    direction agree; else double backward, once validated (see `choose_backend`). Costs a forward
    pass, and two to four gradients where it sees no kinks.
    """
    how, ranks = subject.how, subject.ranks
    if how.hvp != "auto" or how.operator != "hessian" or not ranks.all(batch is not None):
        return choose_backend(subject, batch)
    if is_sharded(list(subject.model.parameters())):
        return choose_backend(subject, batch)
    tried = subject.set(hvp="one_sided")
    with ranks.together():
        check_own_loss(tried, batch)
    with ranks.together():
        check_micro_batches(tried, batch)
    kink, error = "", None
    try:
        with tried.on([batch], bends=bends) as objective:
            kink = objective.kink()
            # along the gradient steps are so short that they cross few kinks
            along = objective.layout.rademacher(generator(0))
            if not ranks.any(bool(kink)) and objective.is_finite():
                error = objective.smoothness(along)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # which double backward will tell of, or not meet
        error = None
    if error is not None and error <= _SMOOTH:
        facts: Facts = {"validated": False, "smoothness_error": error}
        return tried, facts | {"validation": "differences of two steps agree"}
    bends.clear()
    subject, facts = choose_backend(subject, batch)
    if error is not None:
        facts["smoothness_error"] = error
    return subject, facts | {"kink": kink} if kink else facts
