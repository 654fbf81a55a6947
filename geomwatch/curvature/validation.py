"""What to check of a model before it is measured: double backward, and cutting its batches."""

from __future__ import annotations

from typing import Any

import torch

from geomwatch.curvature.agreement import Validation, validate
from geomwatch.curvature.padding import padding_mask
from geomwatch.curvature.subject import Subject
from geomwatch.errors import NoCurvatureError, UsageError, WithheldError
from geomwatch.parallel.collectives import refuse_collectives
from geomwatch.vectors.fsdp import is_sharded
from geomwatch.vectors.layout import generator

_ITEMS = 4
_PIECES_AGREE = 1e-4
# Two steps, h and h / 4, of a smooth loss differ by their truncation, some 1e-3; across kinks by
# 1 and more. Between them lies room of two decades.
_SMOOTH = 3e-2

_ASYMMETRY = 1e-2  # of differences in float32, which are good to 0.2 %


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


def choose_backend(subject: Subject, batch: Any) -> tuple[Subject, Facts]:
    """Check `micro_batch`, validate double backward; return what to measure by, and the findings.

    `hvp` "auto" becomes "finite_difference" where double backward is wrong.
    """
    ranks, hvp = subject.ranks, subject.how.hvp
    with ranks.together():
        check_own_loss(subject, batch)
    with ranks.together():
        check_micro_batches(subject, batch)
    if hvp == "finite_difference":
        return subject, {
            "validated": False,
            "validation": "differences of gradients check themselves",
            **_asymmetry_of_shards(subject, batch),
        }
    if is_sharded(list(subject.model.parameters())):
        return subject, {"validated": False, "validation": "not run on sharded parameters"}
    found = _validated(subject.alone(), batch)
    facts: Facts = {"validated": found.passed is True}
    if found.error is not None:
        facts["validation_error"] = found.error
    if found.reason:
        facts["validation"] = found.reason
    if found.passed is False:
        facts["validation_failed"] = True
    wrong = ranks.any(found.passed is False) and hvp == "auto"
    if wrong:
        facts["fallback"] = found.reason or "another rank has found double backward wrong"
    return (subject.set(hvp="finite_difference") if wrong else subject), facts


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


def _asymmetry_of_shards(subject: Subject, batch: Any) -> dict[str, str]:
    """Say that differences of gradients on local shards have no spectrum, if they have none.

    They are products with J, the gradient's Jacobian. Where part of the loss is held constant for
    its gradient J is not symmetric, and nothing else would tell: double backward, which gives the
    Hessian of what is left, can't be had here. 1 - v'J(Jv) / ||Jv||^2 is 0 where J = J', and on
    average ||J - J'||^2 / 2 ||J||^2. Two HVPs on a few items of each rank.
    """
    layout = subject.layout
    if not layout.is_cut:
        return {}
    few = [] if batch is None else [subject.cutter.head(batch, _ITEMS)]
    with subject.set(micro_batch=None).on(few) as objective:
        v = layout.normal(generator(0))
        v = v / v.norm()
        try:
            jv = objective.hvp(v)
            size = float(jv.norm())
            asymmetry = 1 - float(v @ objective.hvp(jv / size)) / size if size > 0 else 0.0
        except NoCurvatureError:  # which the probe will tell of
            return {}
    if not asymmetry > _ASYMMETRY:
        return {}
    return {
        "obstacle": "part of the loss is held constant for its gradient (detach(), a "
        "straight-through estimator), so that its differences have no real spectrum; "
        "hvp='double_backward' measures the curvature with that part held, on a replica"
    }


def _validated(subject: Subject, batch: Any) -> Validation:
    """Validate double backward on a few items, on this rank."""
    items = subject.cutter.count(batch) if batch is not None else 0
    if items == 0:
        return Validation(None, reason="this rank has no items to run it on")
    # in float64 an item takes the memory of two
    most = max(1, (subject.how.micro_batch or 2 * _ITEMS) // 2)
    few = [subject.cutter.head(batch, min(_ITEMS, most, items))]
    tested = subject.set(operator="hessian", hvp="double_backward")
    kept = padding_mask(list(subject.model.modules()), subject.layout)
    found = validate(lambda: tested.on(few, dtype=torch.float64), kept)
    if found.error is None:  # of a model made for one precision: in that one, if it is smooth
        inherent = validate(lambda: tested.on(few))
        found = found if inherent.passed is None else inherent
    return found


def check_micro_batches(subject: Subject, batch: Any) -> None:
    """Compare the loss of the whole batch with what its pieces make up, once.

    Raises:
        UsageError: they differ by more than 1e-4: a loss over the whole batch, or BatchNorm.
    """
    size, ranks = subject.how.micro_batch, subject.ranks
    cuts = size is not None and batch is not None and size < subject.cutter.count(batch)
    if not ranks.any(cuts):
        return
    with subject.set(micro_batch=None).on([batch]) as whole:
        normalizes = whole.normalizes_batches
    if ranks.any(normalizes):
        raise UsageError(
            f"micro_batch must not cut the batches of a BatchNorm in train mode, got {size}: each "
            "piece would have its own statistics. Leave micro_batch out, or pass mode='eval'."
        )
    if is_sharded(list(subject.model.parameters())):
        why = _difference_of_pieces(subject, batch)
    else:
        why = _why_no_chunks(subject, batch) if cuts else ""
    if ranks.any(bool(why)):
        raise UsageError(
            f"micro_batch must leave the loss as it is, got {size}: it is no mean over items. "
            f"{why or 'Another rank says why.'} Leave micro_batch out."
        )


def _why_no_chunks(subject: Subject, batch: Any) -> str:
    """Find out how the batch may be cut; say why it can't be, "" where it can."""
    with subject.alone().set(micro_batch=None).on([batch]) as whole:
        try:
            whole.check_chunks(subject.how.micro_batch or whole.items)
        except WithheldError as why:
            return f"{why}."
    return ""


def _difference_of_pieces(subject: Subject, batch: Any) -> str:
    """Say how far the loss is from that of its pieces, which all ranks evaluate together."""
    for mode in (subject.how.mode, "eval"):  # in train mode dropout draws other masks for pieces
        losses = []
        for tested in (subject.set(micro_batch=None, mode=mode), subject.set(mode=mode)):
            with tested.on([batch]) as objective:
                losses.append(objective.value())
        difference = abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-12)
        if difference <= _PIECES_AGREE:
            return ""
    return f"It differs by {difference:.1e}."
