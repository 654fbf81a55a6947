"""Is the loss that a probe computes the one that a Trainer trains on? Asked before the first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from geomwatch.errors import UsageError
from geomwatch.integrations._host.replay import replay, turned
from geomwatch.integrations._transformers.loss import TrainerLoss, Window
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import Layout

_LOSS_TOLERANCE = 1e-3  # relative; a forward pass may move a spectral norm's vectors a little
_GRADIENT_TOLERANCE = 1e-2  # between directions; of gradients in 16 bits, which round as they sum:
_NARROW_TOLERANCE = 5e-2
_REMEDY = (
    "Curvature of another loss would be measured. Pass GeomwatchCallback(loss_fn=...), a function "
    "(model, inputs) -> the loss of a micro-batch that is trained on."
)
_SAME = "on the same batch, weights and random state"


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


def check_reproduced(
    model: nn.Module, loss_fn: TrainerLoss, window: Window, *, trainer: str, ranks: Ranks
) -> None:
    """Compute loss and gradient again as in training, and compare them with training's own.

    With the same kernels, random state and precision they agree to rounding. Costs a forward and a
    backward pass for each micro-batch, and two vectors of the model's size.

    Raises:
        UsageError: they differ, on this rank or on another.
    """
    params = Layout.of(model).params
    loss, gradient = _replayed(model, loss_fn, window, params, ranks)
    trained = float(window.loss)
    if ranks.any(_differ(loss, trained)):
        raise UsageError(
            f"{trainer}.training_step must train on the loss that compute_loss returns, got "
            f"{trained:.6g} in training and {loss:.6g} from compute_loss, {_SAME}. {_REMEDY}"
        )
    angle = turned(gradient, params)
    narrow = any(p.dtype.itemsize < 4 for p in params)
    if angle > (_NARROW_TOLERANCE if narrow else _GRADIENT_TOLERANCE):
        raise UsageError(
            f"{trainer}.training_step must train on the loss that compute_loss returns, got "
            f"gradients that lie {angle:.0%} apart, {_SAME}: it trains on something else as well. "
            f"{_REMEDY}"
        )


def difference_to_training(
    model: nn.Module, loss_fn: TrainerLoss, window: Window, ranks: Ranks
) -> str:
    """Say how a loss_fn of the user's differs from what is trained on; "" if it does not."""
    loss, _ = _replayed(model, loss_fn, window, Layout.of(model).params, ranks)
    trained = float(window.loss)
    if not ranks.any(_differ(loss, trained)):
        return ""
    return (
        f"loss_fn gives {loss:.6g} where the Trainer trains on {trained:.6g}, {_SAME}. Curvature "
        "is measured of loss_fn, and the stability margin is right for that loss only."
    )


def _replayed(
    model: nn.Module,
    loss_fn: TrainerLoss,
    window: Window,
    params: Sequence[Tensor],
    ranks: Ranks,
) -> tuple[float, list[Tensor]]:
    pieces = window.micro_batches()
    total = sum(loss_fn.weight(piece) for piece in pieces)
    shares = [(loss_fn.weight(piece) / total, piece) for piece in pieces]
    isolates = loss_fn.isolates()
    return replay(model, loss_fn, shares, params=params, isolates=isolates, ranks=ranks)


def _differ(loss: float, trained: float) -> bool:
    return math.isfinite(trained) and abs(loss - trained) > _LOSS_TOLERANCE * abs(trained) + 1e-6
