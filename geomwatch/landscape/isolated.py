"""Flat minima behind a wall: the sharpness of a checkpoint against the barrier to another one."""

from __future__ import annotations

from geomwatch.errors import UsageError
from geomwatch.landscape.results import Barrier
from geomwatch.records import Alert, Record
from geomwatch.rules.message import alert

RULE = "flat_but_isolated"
_SHARPNESS = "normalized_sharpness_linf"


def judge_isolation(
    record: Record, barrier: Barrier, *, wall: float = 20.0, rise: float = 0.1
) -> Alert | None:
    """Tell whether a minimum is flat nearby and yet walled off from another one.

    The paper's rule, normalised sharpness <= 1e-4 and barriers >= 1, without its units: the
    barrier's `height` must be at least `wall` times `normalized_sharpness_linf`, the most that
    moving each weight by 1 % of itself adds to the loss, and add more than `rise` of the mean loss
    of its ends. Six kinds of small nets: two seeds 28 to 170, two runs that share their first half
    less than 1, their first five steps up to 8. Costs nothing.

    Args:
        record: `geomwatch.measure(model, loss_fn, batch, how=Measurement(mode="eval",
            quantities="normalized_sharpness_linf"))` of one end of the path, on the barrier's data.
        barrier: from that checkpoint to another.

    Returns:
        An "info" alert, or None if it is not isolated.

    Raises:
        UsageError: the record lacks the sharpness, one of the two has no value, or `wall` is not
            positive.

    Example:
        >>> import numpy as np
        >>> from geomwatch.records import Estimate
        >>> record = Record(0, 0.1, (), 0.0, {"normalized_sharpness_linf": Estimate(0.01)})
        >>> path = np.linspace(0, 1, 3), np.array([0.1, 0.9, 0.1]), "linear", False, 0.1, 0.1
        >>> found = Barrier(*path, 0.9, 0.5, 0.8, 0.5, 0, path[1], {})
        >>> alert = judge_isolation(record, found)
        >>> alert.severity, alert.value, alert.limit  # the height, and 20 x the sharpness
        ('info', 0.8, 0.2)
    """
    if not wall > 0:
        raise UsageError(f"wall must be positive, got {wall!r}.")
    sharpness, height = _sharpness(record), barrier.height
    if height is None:
        raise UsageError(
            "barrier must have a height, got a path without a finite loss at its ends. Check the "
            "two checkpoints."
        )
    ends = (barrier.loss_a + barrier.loss_b) / 2
    if height < wall * sharpness or height <= rise * abs(ends):
        return None
    ratio = height / sharpness if sharpness > 0 else float("inf")
    kind = "aligned" if barrier.aligned else "not aligned"
    text = (
        f"flat but isolated: moving each weight by 1 % of itself adds at most {sharpness:.2g} to "
        f"the loss, but the way to the other solution ({barrier.path}, {kind}) leads over a wall "
        f"of {height:.3g}, {ratio:.3g} x that (told from {wall:g} x), between ends at "
        f"{barrier.loss_a:.3g} and {barrier.loss_b:.3g}. Expect other seeds to end elsewhere: "
        "report several, and don't average these weights. "
    )
    if not barrier.aligned:
        text += "Mere permutations of units make such walls: measure again with align=True."
    else:
        text += "No permutation of units explains it; bend=True looks for a way around."
    return alert(RULE, "info", text, value=height, limit=wall * sharpness, step=record.step)


def _sharpness(record: Record) -> float:
    if _SHARPNESS not in record:
        raise UsageError(
            f"record must hold {_SHARPNESS}, got {', '.join(record) or 'nothing'}. Measure it with "
            f'quantities=["{_SHARPNESS}"].'
        )
    found = record[_SHARPNESS]
    if found.value is None:
        raise UsageError(f"record must hold a value of {_SHARPNESS}, got none: {found.reason}.")
    return found.value
