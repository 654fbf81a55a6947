"""May a batch be cut to `micro_batch`? Asked once, before the first probe."""

from __future__ import annotations

from typing import Any

from geomwatch.curvature.subject import Subject
from geomwatch.errors import UsageError, WithheldError
from geomwatch.vectors.fsdp import is_sharded

_PIECES_AGREE = 1e-4


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
