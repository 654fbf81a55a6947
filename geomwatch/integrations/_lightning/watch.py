"""One optimizer of a Lightning module: its monitor, and the batches its gradient is made of."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from geomwatch.controllers.protocol import copies
from geomwatch.curvature import batches
from geomwatch.errors import UsageError
from geomwatch.integrations._host.unknown import Unknown
from geomwatch.integrations._lightning.actuators import TrainerAccumulation, actuators_of
from geomwatch.integrations._lightning.host import trained_model
from geomwatch.integrations._lightning.loss import MicroBatch, StepLoss
from geomwatch.integrations._lightning.tap import StepCall
from geomwatch.isolation.snapshot import RandomState
from geomwatch.monitoring.monitor import Monitor
from geomwatch.monitoring.options import Options
from geomwatch.quantities.measurement import check_how
from geomwatch.records import Alert, Record
from geomwatch.sinks import logger

_LONGEST = 64  # batches that a module may accumulate by hand


class Watch:
    """Feeds a monitor the windows of its optimizer's steps."""

    def __init__(
        self, name: str, trainer: Any, module: nn.Module, optimizer: Any, loss: StepLoss
    ) -> None:
        self.name, self.optimizer, self.loss = name, optimizer, loss
        self.window: list[StepCall] = []
        self._trainer, self._module = trainer, module
        self._stepped_at = -1  # trainer.global_step
        self._announced = 0  # steps that Lightning told of,
        self._taken = 0  # and those that the optimizer took
        self._alerts_seen = 0
        self._told = False
        self._windows: list[TrainerAccumulation] = []
        register = getattr(optimizer, "register_step_post_hook", None)
        self._handle = None if register is None else register(self._count)

    def start(self, options: Options) -> None:
        """Make the monitor; of the optimizer's own parameters, where there are several.

        Raises:
            UsageError: an option can't work.
        """
        how = check_how(options.get("how"))
        how = replace(how, also=(*self.loss.isolates(), *how.also))
        if how.batch is not None:
            how = replace(how, batch=self._prepared(how.batch))
        own = self._own_names(how.params)
        if not own:
            logger.warning(
                "configure_optimizers() gives %s no parameter of the module that is to be "
                "measured: there are no steps to probe before.",
                type(self.optimizer).__name__,
            )
        elif self.name:
            how = replace(how, params=own)
        controllers = copies(options.get("controllers", ()))
        complete: Any = {**options, "how": how, "controllers": controllers}
        self.monitor = Monitor(trained_model(self._trainer), self.loss, self.optimizer, **complete)
        if complete["controllers"]:
            actuators = actuators_of(self._trainer, self._module, self.optimizer)
            self._windows = [a for a in actuators if isinstance(a, TrainerAccumulation)]
            self.monitor.equip(*actuators)

    def restart(self, options: Options) -> None:
        """Make another monitor that goes on counting, where other parameters are to be measured."""
        before = self.monitor
        before.release()
        self.start(options)
        self.monitor.succeed(before)

    def take_up(self, state: Any, step: int) -> None:
        """Go on from a checkpoint's state, or without one from `step`.

        Raises:
            UsageError: the state was saved with other rules.
        """
        if state is not None:
            try:
                self.monitor.load_state_dict(state)
            except UsageError:
                raise
            except Exception as error:  # of another version, say
                logger.warning(
                    "geomwatch's part of the checkpoint can't be read (%s: %s); it starts afresh.",
                    type(error).__name__,
                    error,
                )
            else:
                return
        if step:
            self.monitor.load_state_dict({**self.monitor.state_dict(), "step": step})

    @property
    def params(self) -> list[Tensor]:
        """The parameters that have a gradient now."""
        every = (p for group in self.optimizer.param_groups for p in group["params"])
        return [p for p in every if p.grad is not None]

    def add(self, call: StepCall) -> None:
        """Add a batch to the window, or put it in its own place: a closure may run repeatedly."""
        if self.window and self.window[-1].turn == call.turn:
            self.window.pop()
        if len(self.window) == _LONGEST:  # gradients that nobody steps with or zeroes
            self.window.clear()
        self.window.append(call)

    def is_new_step(self) -> bool:
        """Tell whether this step has not been seen yet; an LBFGS evaluates its closure often."""
        if self._stepped_at == self._trainer.global_step:
            return False
        self._stepped_at = self._trainer.global_step
        self._announced += 1
        return True

    def step(
        self, window: Sequence[StepCall], norm: Tensor | None, *, known: bool
    ) -> Record | None:
        """Watch the coming step, whose gradient had this norm before clipping.

        A window that is not `known` can't be evaluated any more.
        """
        for call in window if known else ():
            self.monitor.observe(MicroBatch.of(call))
        if not known and self._trainer.world_size > 1:
            self.monitor.observe(Unknown("training_step has changed this batch in place"))
        losses = [call.loss for call in window if call.loss is not None]
        complete = len(losses) == len(window) > 0
        scale = self._scale()
        return self.monitor.step(
            loss=sum(losses[1:], losses[0]) / len(losses) if complete else None,
            grad_norm=None if norm is None else norm / scale,
            grad_scale=scale,
        )

    def batch_ends(self, index: int) -> None:
        """Change the accumulation where a controller wants it and a window ends here."""
        for window in self._windows:
            window.batch_ends(index)

    def new_alerts(self) -> list[Alert]:
        """Return the alerts since the last call."""
        seen, self._alerts_seen = self._alerts_seen, len(self.monitor.alerts)
        return self.monitor.alerts[seen:]

    def check_steps(self) -> None:
        """Make sure that no step is taken behind Lightning's back.

        Raises:
            UsageError: the first one was.
        """
        unseen = self._taken - self._announced
        if unseen <= 0 or self._told:
            return
        self._told = True
        message = (
            f"optimizers must be stepped through Lightning, got {unseen} steps of "
            f"{type(self.optimizer).__name__} that it did not know of, so no probe came before "
            "them. Step what self.optimizers() returns, not the torch optimizer itself."
        )
        if self._announced == 0:
            raise UsageError(message)
        logger.warning("%s", message)

    def close(self) -> None:
        """Leave the optimizer as it was; the history stays."""
        if self._handle is not None:
            self._handle.remove()
        if hasattr(self, "monitor"):
            self.monitor.close()

    def _count(self, *_: object) -> None:
        self._taken += 1

    def _scale(self) -> float:
        """What a GradScaler has the gradient multiplied by: a fused optimizer divides in step()."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return float(scaler.get_scale()) if scaler is not None and fused else 1.0

    def _prepared(self, batch: Any) -> MicroBatch:
        """Treat the user's probe batch as the training loop treats its batches."""
        random = RandomState()  # hooks may augment
        batch = self._trainer.precision_plugin.convert_input(batch)
        batch = self._trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        random.restore()
        return MicroBatch(batch, batches.items(batch))

    def _own_names(self, patterns: str | Sequence[str] | None) -> list[str]:
        wanted = [patterns] if isinstance(patterns, str) else patterns
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        names = [name for name, p in self._module.named_parameters() if id(p) in own]
        if wanted is not None:
            names = [n for n in names if any(fnmatch.fnmatchcase(n, w) for w in wanted)]
        return [glob.escape(name) for name in names]
