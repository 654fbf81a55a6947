"""One training of a Trainer, watched: from its first step to its last."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError
from geomwatch.integrations._host.check import SAME, Difference, check_against_training
from geomwatch.integrations._host.options import MonitorOptions
from geomwatch.integrations._host.watch import HostWatch
from geomwatch.integrations._transformers.loss import TrainerLoss, Window
from geomwatch.integrations._transformers.tap import TrainerTap
from geomwatch.integrations._transformers.trainer import actuators_of, trained_model
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Record
from geomwatch.vectors.layout import Layout

_LOSS_TOLERANCE = 1e-3  # relative; a forward pass may move a spectral norm's vectors a little
_ANGLE_TOLERANCE = 1e-2  # between directions; of gradients in 16 bits, which round as they sum:
_NARROW_TOLERANCE = 5e-2
_REMEDY = (
    "Curvature of another loss would be measured. Pass GeomwatchCallback(loss_fn=...), a function "
    "(model, inputs) -> the loss of a micro-batch that is trained on."
)


class TrainingWatch(HostWatch[TrainerLoss]):
    """Taps a Trainer, and gathers the window of each of its steps.

    Raises:
        UsageError: an option can't work.
    """

    def __init__(
        self, trainer: Any, optimizer: Any, options: MonitorOptions, loss_fn: LossFn | None
    ) -> None:
        self._trainer = trainer
        loss = TrainerLoss(trainer, loss_fn)
        model = trained_model(trainer)
        monitor = options.monitor(
            model,
            loss,
            optimizer,
            actuators=lambda: actuators_of(trainer),
        )
        super().__init__(monitor, loss, Ranks.of(model))
        self._tap = TrainerTap(trainer, keeps_random=loss_fn is not None)

    @property
    def is_open(self) -> bool:
        """Whether the training still goes on."""
        return self._tap.is_open

    def step(self) -> Record | None:
        """Watch the coming optimizer step.

        Raises:
            UsageError: at the first step, where the loss that is trained on can't be computed.
        """
        steps, grad_norm = self._tap.take()
        if not steps:
            return self.monitor.step(grad_norm=grad_norm)
        window = Window(steps)
        known = self._knows(window)
        return self.watch_step(
            self.loss.micro_batches(window)
            if known
            else "training_step got its loss in another way",
            loss=_scalar(window.loss),
            grad_norm=grad_norm,
        )

    def close(self) -> None:
        """Leave the Trainer as it was; the history stays."""
        if self.is_open:
            self._tap.close()
            super().close()

    def _knows(self, window: Window) -> bool:
        """Tell whether the window's loss can be computed; raise at the first step if not."""
        trainer = type(self._trainer).__name__
        if not self.is_checked:
            self.check_once(
                lambda: _check_window(
                    self._trainer.model, self.loss, window, trainer=trainer, ranks=self.ranks
                )
            )
            return True
        try:
            if self.loss.given is None:
                _check_seen(window, trainer)
        except UsageError as error:
            self.say_once(f"{error} This step is not measured; this is said once.", about="seen")
            return False
        return True


def _scalar(loss: Tensor | float) -> Tensor | float:
    return loss.detach() if isinstance(loss, Tensor) else float(loss)


def _check_seen(window: Window, trainer: str) -> None:
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


def _check_window(
    model: nn.Module, loss_fn: TrainerLoss, window: Window, *, trainer: str, ranks: Ranks
) -> None:
    """Compare a window with what training has made of it.

    Raises:
        UsageError: compute_loss is not called once a micro-batch, or it is not what is trained on.
    """
    if loss_fn.given is None:
        with ranks.together():
            _check_seen(window, trainer)
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
