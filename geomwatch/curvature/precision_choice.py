"""At what precision does a loss run? At float32, unless it has no kernels for it."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from geomwatch.curvature.subject import Subject
from geomwatch.errors import UsageError, WithheldError
from geomwatch.vectors.fsdp import is_sharded

Facts: TypeAlias = dict[str, str | int | float | bool]

FEW = 4  # items


def at_a_precision_that_runs(subject: Subject, batch: Any) -> tuple[Subject, Facts]:
    """Leave float32 for the precision of training where the loss has no kernels for it.

    A model that casts its inputs to 16 bits itself, or an attention that takes no others. Costs a
    forward pass over a few items.
    """
    narrow = subject.set(precision="training")
    why, falls, wide = "", False, subject.how.precision == "float32"
    if is_sharded(list(subject.model.parameters())):
        return subject, {}
    if wide and batch is not None:
        for data in (subject.cutter.head(batch, FEW), batch):
            why = _why_it_does_not_run(subject.alone(), data)
            falls = bool(why) and not _why_it_does_not_run(narrow.alone(), data)
            if falls or not why:
                break
    if not subject.ranks.any(falls):
        return subject, {}
    return narrow, {"precision_fallback": f"it does not run in float32 ({why or 'elsewhere'})"}


def _why_it_does_not_run(subject: Subject, batch: Any) -> str:
    try:
        with subject.set(micro_batch=None).on([batch]) as objective:
            objective.value()
    except (torch.OutOfMemoryError, UsageError, WithheldError):
        return ""
    except Exception as error:  # whatever a kernel says
        return str(error).partition("\n")[0]
    return ""


def why_no_products(subject: Subject, batch: Any) -> dict[str, str]:
    """Look for functions whose backward has no derivative: differences can't tell in 16 bits."""
    with subject.set(micro_batch=None).on([batch]) as objective:
        found = objective.raw_backward()
    if found is None:
        return {}
    return {
        "obstacle": f"{found} in the loss has no second derivative, although it does not say so, "
        "and differences of gradients need float32"
    }


def must_run(subject: Subject) -> bool:
    """Tell whether the loss is evaluated, and has to come out, before it is validated."""
    how = subject.how
    return how.micro_batch is not None or how.hvp == "finite_difference" or subject.ranks.size > 1
