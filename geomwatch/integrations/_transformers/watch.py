"""One training of a Trainer, watched: from its first step to its last."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from geomwatch.controllers.protocol import copies
from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError
from geomwatch.integrations._host.json_state import from_json, to_json
from geomwatch.integrations._host.unknown import Unknown
from geomwatch.integrations._transformers.actuators import actuators_of
from geomwatch.integrations._transformers.check import (
    check_reproduced,
    check_seen,
    difference_to_training,
)
from geomwatch.integrations._transformers.loss import TrainerLoss, Window
from geomwatch.integrations._transformers.tap import Tap
from geomwatch.integrations._transformers.trainer import trained_model
from geomwatch.monitoring.monitor import Monitor
from geomwatch.monitoring.options import Options
from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.measurement import check_how
from geomwatch.records import Alert, Record
from geomwatch.sinks import logger


class Watch:
    """A Tap on the Trainer and a Monitor that it feeds."""

    def __init__(
        self, trainer: Any, optimizer: Any, options: Options, loss_fn: LossFn | None
    ) -> None:
        self._model: nn.Module = trainer.model
        self._name = type(trainer).__name__
        self._user_loss = loss_fn is not None
        self._loss_fn = TrainerLoss(trainer, trainer.compute_loss, loss_fn)
        isolated: Options = {**options}
        how = check_how(options.get("how"))
        isolated["how"] = replace(how, also=(*how.also, *self._loss_fn.isolates()))
        trained = trained_model(trainer)
        self.ranks = Ranks.of(trained)
        isolated["controllers"] = copies(options.get("controllers", ()))
        self.monitor = Monitor(trained, self._loss_fn, optimizer, **isolated)
        if isolated["controllers"]:
            self.monitor.equip(*actuators_of(trainer))
        self._tap: Tap | None = Tap(trainer, keeps_random=self._user_loss)
        self._checked = False
        self._told = False
        self._alerts_seen = 0
        self._every = options.get("every")

    @property
    def is_open(self) -> bool:
        """Whether the training still goes on."""
        return self._tap is not None

    def start(self, state: Any, saved: Any) -> None:
        """Go on from the state of a checkpoint, or else count from the Trainer's present step.

        Raises:
            UsageError: the state was saved with other rules.
        """
        steps = state.max_steps - state.global_step
        if self._every is not None and 1 < steps <= self._every:
            logger.warning(
                "every=%d makes one probe only, at the first of the %d steps of this run. Pass "
                "every=%d, say, or leave it out.",
                self._every,
                steps,
                max(1, steps // 10),
            )
        if not self._resume(saved) and state.global_step > 0:
            present = {**self.monitor.state_dict(), "step": state.global_step}
            self.monitor.load_state_dict(present)

    def _resume(self, saved: Any) -> bool:
        if saved is None:
            return False
        try:
            self.monitor.load_state_dict(from_json(saved))
        except UsageError:
            raise
        except Exception as error:  # of another version, say
            logger.warning(
                "what the checkpoint holds of geomwatch can't be read (%s: %s): it starts afresh.",
                type(error).__name__,
                error,
            )
            return False
        return True

    def step(self) -> Record | None:
        """Watch the coming optimizer step.

        Raises:
            UsageError: at the first step, where the loss that is trained on can't be computed.
        """
        assert self._tap is not None
        steps, grad_norm = self._tap.take()
        if not steps:
            return self.monitor.step(grad_norm=grad_norm)
        window = Window(steps)
        if self._knows(window):
            for batch in window.micro_batches():
                self.monitor.observe(batch)
        elif self.ranks.size > 1:
            self.monitor.observe(Unknown("training_step got its loss in another way"))
        return self.monitor.step(loss=_scalar(window.loss), grad_norm=grad_norm)

    def new_alerts(self) -> list[Alert]:
        """Return the alerts since the last call, on every rank."""
        seen, self._alerts_seen = self._alerts_seen, len(self.monitor.alerts)
        return self.monitor.alerts[seen:]

    def state(self) -> Any:
        """Return the monitor's state as JSON."""
        return to_json(self.monitor.state_dict())

    def close(self) -> None:
        """Leave the Trainer as it was; the history stays."""
        if self._tap is not None:
            self._tap.close()
            self._tap = None
            self.monitor.close()

    def _knows(self, window: Window) -> bool:
        """Tell whether the window's loss can be computed; raise at the first step if not."""
        if not self._checked:
            self._check(window)
            return True
        try:
            if not self._user_loss:
                check_seen(window, self._name)
        except UsageError as error:
            if not self._told:
                self._told = True
                logger.warning("%s This step is not measured; this is said once.", error)
            return False
        return True

    def _check(self, window: Window) -> None:
        try:
            with self.ranks.refused_together():
                self._compare(window)
        except UsageError:
            raise
        except Exception as error:  # the probe will say more, and training goes on
            logger.warning(
                "whether the loss measured is the loss trained on could not be checked: %s: %s",
                type(error).__name__,
                error,
            )
        self._checked = True

    def _compare(self, window: Window) -> None:
        if self._user_loss:
            said = difference_to_training(self._model, self._loss_fn, window, self.ranks)
            if said:
                logger.warning("%s", said)
            return
        with self.ranks.together():
            check_seen(window, self._name)
        check_reproduced(self._model, self._loss_fn, window, trainer=self._name, ranks=self.ranks)


def _scalar(loss: Tensor | float) -> Tensor | float:
    return loss.detach() if isinstance(loss, Tensor) else float(loss)
