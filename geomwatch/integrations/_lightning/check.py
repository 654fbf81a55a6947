"""What is said of a training_step that gives another loss, or gradient, the second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.integrations._host.check import SAME, Difference, check_against_training
from geomwatch.integrations._host.loss import HostLoss, MicroBatch
from geomwatch.parallel.ranks import Ranks
from geomwatch.sinks import logger

_LOSS_TOLERANCE = 1e-2  # relative; a forward pass may move a spectral norm's vectors a little
_ANGLE_TOLERANCE = 5e-2  # between directions


def check_window(
    module: nn.Module,
    loss_fn: HostLoss,
    window: Sequence[MicroBatch],
    params: Sequence[Tensor],
    ranks: Ranks,
) -> None:
    """Compare a window, whose losses are known, with what training has made of it.

    Raises:
        UsageError: training_step gives another loss, steps an optimizer or exchanges tensors
            between ranks.
    """
    check_against_training(
        module,
        loss_fn,
        window,
        sum(float(micro.call.loss) for micro in window) / len(window),
        params=params,
        ranks=ranks,
        tolerance=_LOSS_TOLERANCE,
        refuse=_refuse,
        judge_angle=_judge_angle,
    )


def _refuse(found: Difference) -> NoReturn:
    where = "" if found.is_here else "here, but not on another rank, "
    raise UsageError(
        f"training_step must give the same loss when it is evaluated again, got {found.loss:.6g} "
        f"where {found.trained:.6g} is trained on, {where}{SAME}: it depends on what it changes "
        "itself (a counter, a queue) or on chance of its own. Curvature of another loss would be "
        "measured. Pass GeomwatchCallback(loss_fn=...), a function (module, batch) -> loss, or "
        "give the module a method geometry_loss(batch)."
    )


def _judge_angle(angle: float) -> None:
    if angle > _ANGLE_TOLERANCE:
        logger.warning(
            "the gradient that is stepped with lies %.0f%% apart from that of the loss, %s: a "
            "hook, a callback or the module's own backward() changes it. Curvature is measured of "
            "the loss alone.",
            100 * angle,
            SAME,
        )
