"""What is said of a Trainer, or a loss_fn, whose loss is not the one that is trained on."""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from geomwatch.errors import UsageError
from geomwatch.integrations._host.check import SAME, Difference, check_against_training
from geomwatch.integrations._transformers.loss import TrainerLoss, Window
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import Layout

_LOSS_TOLERANCE = 1e-3  # relative; a forward pass may move a spectral norm's vectors a little
_ANGLE_TOLERANCE = 1e-2  # between directions; of gradients in 16 bits, which round as they sum:
_NARROW_TOLERANCE = 5e-2
_REMEDY = (
    "Curvature of another loss would be measured. Pass GeomwatchCallback(loss_fn=...), a function "
    "(model, inputs) -> the loss of a micro-batch that is trained on."
)


def check_seen(window: Window, trainer: str) -> None:
    """Make sure that the window's loss is known from one call of compute_loss a micro-batch.

    Raises:
        UsageError: training_step has gone about it in another way.
    """
    calls = {len(step.calls) for step in window.steps}
    if all(step.call is not None and step.call.loss is not None for step in window.steps):
        return
    times = " and ".join(str(n) for n in sorted(calls))
    seen = "one without a tensor as its loss" if calls == {1} else f"{times} calls"
    raise UsageError(
        f"{trainer}.training_step must get its loss from one call of compute_loss, got {seen}. "
        f"{_REMEDY}"
    )


def check_window(
    model: nn.Module, loss_fn: TrainerLoss, window: Window, *, trainer: str, ranks: Ranks
) -> None:
    """Compare a window with what training has made of it.

    Raises:
        UsageError: compute_loss is not called once a micro-batch, or it is not what is trained on.
    """
    if loss_fn.given is None:
        with ranks.together():
            check_seen(window, trainer)
    params = Layout.of(model).params
    must = f"{trainer}.training_step must train on the loss that compute_loss returns, got"
    allowed = _NARROW_TOLERANCE if any(p.dtype.itemsize < 4 for p in params) else _ANGLE_TOLERANCE

    def refuse(found: Difference) -> NoReturn:
        raise UsageError(
            f"{must} {found.trained:.6g} in training and {found.loss:.6g} from compute_loss, "
            f"{SAME}. {_REMEDY}"
        )

    def judge_angle(angle: float) -> None:
        if angle > allowed and loss_fn.given is None:
            raise UsageError(
                f"{must} gradients that lie {angle:.0%} apart, {SAME}: it trains on something else "
                f"as well. {_REMEDY}"
            )

    check_against_training(
        model,
        loss_fn,
        loss_fn.micro_batches(window),
        float(window.loss),
        params=params,
        ranks=ranks,
        tolerance=_LOSS_TOLERANCE,
        refuse=refuse,
        judge_angle=judge_angle,
    )
