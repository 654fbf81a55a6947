"""How products are had: by the cheapest way that is right, once that has been checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature.agreement import Validation, validate
from geomwatch.curvature.constants import FEW, holding, moves_constants, no_spectrum_of_differences
from geomwatch.curvature.micro_batches import check_micro_batches
from geomwatch.curvature.padding import padding_mask
from geomwatch.curvature.precision_choice import (
    Facts,
    at_a_precision_that_runs,
    must_run,
    why_no_products,
)
from geomwatch.curvature.subject import Subject
from geomwatch.parallel.collectives import refuse_collectives
from geomwatch.vectors.fsdp import is_sharded
from geomwatch.vectors.layout import generator

# Two steps, h and h / 4, of a smooth loss differ by their truncation, some 1e-3; across kinks by
# 1 and more. Between them lies room of two decades.
_SMOOTH = 3e-2


def choose_products(
    bends: dict[str, float], known: list[tuple[float, Tensor]], subject: Subject, batch: Any
) -> tuple[Subject, Facts]:
    """Choose how products are computed in a run: by the cheapest right way.

    One-sided differences where no function with kinks is in the loss, two steps along a random
    direction agree, and nothing that moves with the weights is constant for the gradient; else
    double backward, once validated (see `choose_backend`). Costs a forward pass, and two to four
    gradients where it sees no kinks. The loss and the gradient (D,) of that batch go into `known`.
    """
    how, ranks = subject.how, subject.ranks
    if how.hvp != "auto" or how.operator != "hessian" or not ranks.all(batch is not None):
        return choose_backend(subject, batch)
    if is_sharded(list(subject.model.parameters())):
        return choose_backend(subject, batch)
    if must_run(subject) and at_a_precision_that_runs(subject, batch)[1]:
        return choose_backend(subject, batch)  # differences drown in the rounding of 16 bits
    return _tried(bends, known, subject, batch)


def _tried(
    bends: dict[str, float], known: list[tuple[float, Tensor]], subject: Subject, batch: Any
) -> tuple[Subject, Facts]:
    ranks, tried = subject.ranks, subject.set(hvp="one_sided")
    with ranks.together():
        check_own_loss(tried, batch)
    with ranks.together():
        check_micro_batches(tried, batch)
    kink, error = "", None
    try:
        with ranks.together(), tried.on([batch], bends=bends) as objective:
            kink = objective.kink()
            # along the gradient steps are so short that they cross few kinks
            along = objective.layout.rademacher(generator(0))
            if not ranks.any(bool(kink)) and objective.is_finite():
                error = objective.smoothness(along)
                known.append((objective.loss(), objective.gradient()))
    except Exception as failure:  # which double backward will tell of, or not meet
        if ranks.any(isinstance(failure, torch.OutOfMemoryError)):
            raise
        error = None
    if error is not None and error <= _SMOOTH and not ranks.any(moves_constants(subject, batch)):
        facts: Facts = {"validated": False, "smoothness_error": error}
        return tried, facts | {"validation": "differences of two steps agree"}
    bends.clear()
    known.clear()
    subject, facts = choose_backend(subject, batch)
    if error is not None:
        facts["smoothness_error"] = error
    return subject, facts | {"kink": kink} if kink else facts


def choose_backend(subject: Subject, batch: Any) -> tuple[Subject, Facts]:
    """Check `micro_batch`, validate double backward; return what to measure by, and the findings.

    `hvp` "auto" becomes "finite_difference" where double backward is wrong, and precision that of
    training where the loss runs in no other.
    """
    facts: Facts = {}
    if must_run(subject):
        subject, facts = at_a_precision_that_runs(subject, batch)
    ranks, hvp = subject.ranks, subject.how.hvp
    with ranks.together():
        check_own_loss(subject, batch)
    with ranks.together():
        check_micro_batches(subject, batch)
    if hvp == "finite_difference":
        return subject, facts | {
            "validated": False,
            "validation": "differences of gradients check themselves",
            **no_spectrum_of_differences(subject, batch),
        }
    if is_sharded(list(subject.model.parameters())):
        return subject, {"validated": False, "validation": "not run on sharded parameters"}
    found = _validated(subject.alone(), batch)
    if ranks.any(found.error is None) and not facts:
        subject, facts = at_a_precision_that_runs(subject, batch)
        found = _validated(subject.alone(), batch) if facts else found
    if found.passed is None:
        facts |= _what_else_is_wrong(subject, batch, found)
    facts |= _facts(found)
    if ranks.any("obstacle" in facts):
        facts.setdefault("obstacle", "another rank has found that there are no products")
    wrong = ranks.any(found.passed is False) and hvp == "auto"
    if wrong:
        facts["fallback"] = found.reason or "another rank has found double backward wrong"
    return (subject.set(hvp="finite_difference") if wrong else subject), facts


def _what_else_is_wrong(subject: Subject, batch: Any, found: Validation) -> dict[str, str]:
    """Say why there are no products, where double backward could not be validated."""
    if subject.how.precision == "training":  # differences drown in rounding
        return why_no_products(subject.alone(), batch)
    if found.error is None:  # differences may be what is left
        return no_spectrum_of_differences(subject, batch)
    return {}


def _facts(found: Validation) -> Facts:
    facts: Facts = {"validated": found.passed is True}
    if found.error is not None:
        facts["validation_error"] = found.error
    if found.reason:
        facts["validation"] = found.reason
    if found.passed is False:
        facts["validation_failed"] = True
    if found.holds:
        facts["holds_constants"] = True
    return facts


def check_own_loss(subject: Subject, batch: Any) -> None:
    """Evaluate the loss once to see whether it needs other ranks; FSDP's layers may.

    Raises:
        UsageError: it does.
    """
    ranks = subject.ranks
    alone = ranks.size == 1 or is_sharded(list(subject.model.parameters()))
    if alone or not ranks.all(batch is not None):
        return
    own = subject.alone().set(micro_batch=None)
    with own.on([batch]) as objective, refuse_collectives():
        objective.loss_at(objective.layout.zeros())


def _validated(subject: Subject, batch: Any) -> Validation:
    """Validate double backward on a few items, on this rank."""
    items = subject.cutter.count(batch) if batch is not None else 0
    if items == 0:
        return Validation(None, reason="this rank has no items to run it on")
    # in float64 an item takes the memory of two
    most = max(1, (subject.how.micro_batch or 2 * FEW) // 2)
    few = [subject.cutter.head(batch, min(FEW, most, items))]
    tested = subject.set(operator="hessian", hvp="double_backward")
    kept = padding_mask(list(subject.model.modules()), subject.layout)
    held = holding(tested)
    found = validate(
        lambda: tested.on(few, dtype=torch.float64),
        kept,
        held=lambda: held.on(few, dtype=torch.float64),
    )
    if found.error is None and subject.how.precision == "training":
        return Validation(None, reason="differences of gradients are all rounding in 16 bits")
    if found.error is None:  # of a model made for one precision: in that one, if it is smooth
        inherent = validate(lambda: tested.on(few))
        found = found if inherent.passed is None else inherent
    return found
