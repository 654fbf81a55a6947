"""One training of a Trainer, watched: from its first step to its last."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError
from geomwatch.integrations._host.options import MonitorOptions
from geomwatch.integrations._host.watch import HostWatch
from geomwatch.integrations._transformers.check import check_seen, check_window
from geomwatch.integrations._transformers.loss import TrainerLoss, Window
from geomwatch.integrations._transformers.tap import TrainerTap
from geomwatch.integrations._transformers.trainer import actuators_of, trained_model
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Record


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
                lambda: check_window(
                    self._trainer.model, self.loss, window, trainer=trainer, ranks=self.ranks
                )
            )
            return True
        try:
            if self.loss.given is None:
                check_seen(window, trainer)
        except UsageError as error:
            self.say_once(f"{error} This step is not measured; this is said once.", about="seen")
            return False
        return True


def _scalar(loss: Tensor | float) -> Tensor | float:
    return loss.detach() if isinstance(loss, Tensor) else float(loss)
