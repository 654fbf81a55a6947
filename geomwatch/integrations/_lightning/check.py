"""Is the loss that a probe computes the one that Lightning trains on? Asked before the first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.integrations._host.replay import replay, turned
from geomwatch.integrations._lightning.loss import MicroBatch, StepLoss
from geomwatch.parallel.ranks import Ranks

_LOSS_TOLERANCE = 1e-2  # relative; a forward pass may move a spectral norm's vectors a little
_ANGLE_TOLERANCE = 5e-2  # between directions
_SAME = "on the same batch, weights and random state"


def difference_to_training(
    module: nn.Module,
    loss_fn: StepLoss,
    window: Sequence[MicroBatch],
    params: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[str, str]:
    """Evaluate a window again as in training; say how its loss, and its gradient, differ.

    With the same kernels, random state and precision they agree to rounding. Both are "" if they
    do; the second also where the gradient says nothing (see `turned`). `params` hold the gradient
    as it is before clipping. All ranks come to the same verdict. Costs a forward and a backward
    pass for each micro-batch.

    Raises:
        UsageError: the loss steps an optimizer, exchanges tensors between ranks, or is none.
    """
    shares = [(1 / len(window), micro) for micro in window]
    loss, gradient = replay(
        module, loss_fn, shares, params=params, isolates=loss_fn.isolates(), ranks=ranks
    )
    trained = _mean_loss(window)
    differs = math.isfinite(trained) and (
        abs(loss - trained) > _LOSS_TOLERANCE * abs(trained) + 1e-6
    )
    if ranks.any(differs):
        where = "" if differs else "here, but not on another rank, "
        return f"{loss:.6g} where {trained:.6g} is trained on, {where}{_SAME}", ""
    angle = turned(gradient, params)
    if angle > _ANGLE_TOLERANCE:
        return "", f"{angle:.0%} apart from that of the loss, {_SAME}"
    return "", ""


def refuse(difference: str) -> None:
    """Refuse a training_step whose loss comes out otherwise.

    Raises:
        UsageError: always.
    """
    raise UsageError(
        f"training_step must give the same loss when it is evaluated again, got {difference}: it "
        "depends on what it changes itself (a counter, a queue) or on chance of its own. Curvature "
        "of another loss would be measured. Pass GeomwatchCallback(loss_fn=...), a function "
        "(module, batch) -> loss, or give the module a method geometry_loss(batch)."
    )


def _mean_loss(window: Sequence[MicroBatch]) -> float:
    known = [float(m.call.loss) for m in window if m.call is not None and m.call.loss is not None]
    return sum(known) / len(known) if len(known) == len(window) else math.nan
