"""geomwatch in a loop on Hugging Face accelerate: `monitor = watch(accelerator, model, ...)`.

The loop, with what is done where:

    for batch in loader:
        with accelerator.accumulate(model):               # sets sync_gradients
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(...)              # the norm it returns is kept
            monitor.step(batch, loss=loss.detach()):
                window += batch
                if accelerator.sync_gradients:
                    <the monitor is stepped here>         # the gradient is that of the coming step
                    accelerator.log(record.scalars(), step=record.step)
            optimizer.step()                              # does nothing until sync_gradients
            optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from geomwatch.curvature.objective import LossFn
from geomwatch.integrations._accelerate.check import check_prepared
from geomwatch.integrations._accelerate.loop import LoopWatch
from geomwatch.integrations._host.options import MonitorOptions, Options
from geomwatch.integrations._host.words import missing, survived
from geomwatch.monitoring.monitor import Monitor
from geomwatch.quantities.measurement import Measurement
from geomwatch.records import Record

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("accelerate", "accelerate") from error

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


def watch(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: Any,
    how: Measurement | None = None,
    *,
    prefix: str = "geom/",
    log: Callable[[Record], None] | None = None,
    **options: Unpack[Options],
) -> AcceleratedMonitor:
    """Watch a training loop on accelerate; call it after `accelerator.prepare`.

    Call `monitor.step(batch)` for each micro-batch, between `accelerator.backward(loss)` and
    `optimizer.step()`. Records go to the accelerator's trackers. `accelerator.save_state` and
    `load_state` take the monitor's state along, as geomwatch.pt.

    Args:
        accelerator: the one that has prepared model and optimizer.
        model: as `prepare` returned it.
        loss_fn: (model, batch) -> the loss of a micro-batch, as `accelerator.backward` gets it.
        optimizer: as `prepare` returned it.
        how: how to measure: a `geomwatch.Measurement`.
        prefix: in front of each metric's name in the trackers.
        log: called with each Record, on the main process, instead of
            `accelerator.log(record.scalars(prefix), step=record.step)`.
        **options: every, budget, rules, controllers, sinks, on_alert: those of
            `geomwatch.Monitor`.

    Raises:
        UsageError: (a ValueError) model or optimizer are not prepared, don't belong together, are
            watched already or can't be; the processes share the model otherwise than by
            DistributedDataParallel or FSDP2; or an option can't work.
    """
    wanted = MonitorOptions("watch(accelerator, model, loss_fn, optimizer", how, options)
    check_prepared(accelerator, model, loss_fn, optimizer)
    return AcceleratedMonitor(
        accelerator, model, loss_fn, optimizer, wanted, prefix=prefix, log=log
    )


def _of_monitor(name: str) -> Any:
    """Return what looks, on an object with a `monitor`, like that property or method of it."""
    return property(
        lambda self: getattr(self.monitor, name),
        lambda self, value: setattr(self.monitor, name, value),
        doc=getattr(Monitor, name).__doc__,
    )


class AcceleratedMonitor(LoopWatch):
    """The Monitor of a loop on accelerate; `watch` makes it.

    It learns from the accelerator which micro-batch completes a gradient, the norm before
    `accelerator.clip_grad_norm_`, and what a GradScaler has the gradients multiplied by. All else
    is that of `monitor`, a `geomwatch.Monitor`.
    """

    name = _of_monitor("name")
    history = _of_monitor("history")
    alerts = _of_monitor("alerts")
    adjustments = _of_monitor("adjustments")
    seconds = _of_monitor("seconds")
    overhead = _of_monitor("overhead")
    equip = _of_monitor("equip")
    release = _of_monitor("release")
    pause = _of_monitor("pause")
    resume = _of_monitor("resume")
    state_dict = _of_monitor("state_dict")
    load_state_dict = _of_monitor("load_state_dict")

    def __init__(self, *watched: Any, prefix: str, log: Callable[[Record], None] | None) -> None:
        super().__init__(*watched)
        self._prefix, self._log = prefix, log

    def step(
        self,
        batch: Any = None,
        *,
        loss: Tensor | float | None = None,
        grad_norm: Tensor | float | None = None,
        grad_scale: float = 1.0,
    ) -> Record | None:
        """Watch one micro-batch; the last one of a window is an optimizer step.

        Call it for each micro-batch, after `accelerator.backward(loss)` and
        `accelerator.clip_grad_norm_`, before `optimizer.step()`.

        Args:
            batch: the micro-batch.
            loss: its loss; lets the loss rule see every step.
            grad_norm: before clipping, where that is not done by `accelerator.clip_grad_norm_`.
            grad_scale: of gradients that are scaled by anything but the accelerator's scaler.

        Returns:
            The Record when a probe was due, else None.

        Raises:
            UsageError: at the first calls, when they are made in the wrong place or without a
                batch.
        """
        record = self.watch_micro_batch(batch, loss, grad_norm, grad_scale)
        if record is not None:
            with survived("a record could not be logged", tell=self._tell):
                self._track(record)
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _track(self, record: Record) -> None:
        if self._log is None:
            prefix = f"{self._prefix}{self.name}/" if self.name else self._prefix
            self._accelerator.log(record.scalars(prefix), step=record.step)
        elif self._accelerator.is_main_process:
            self._log(record)

    def _tell(self, what: str) -> None:
        self.say_once(f"{what}. Training goes on.")
