"""geomwatch in a loop on Hugging Face accelerate: `monitor = watch(accelerator, model, ...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from geomwatch.curvature.objective import LossFn
from geomwatch.errors import UsageError
from geomwatch.integrations._accelerate.actuators import actuators_of
from geomwatch.integrations._accelerate.check import PLACE, bare, check_prepared, check_window
from geomwatch.integrations._accelerate.loss import EachAlike
from geomwatch.integrations._accelerate.ties import Ties
from geomwatch.integrations.extras import missing
from geomwatch.isolation.isolation import captured_by
from geomwatch.monitoring.monitor import Monitor
from geomwatch.quantities.measurement import check_how
from geomwatch.records import Record
from geomwatch.stability.problem import unwrap

try:
    from accelerate import Accelerator
except ImportError as error:
    raise missing("accelerate", "accelerate") from error

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from geomwatch.monitoring.options import Options


def watch(
    accelerator: Accelerator,
    model: nn.Module,
    loss_fn: LossFn,
    optimizer: Any,
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
        prefix: in front of each metric's name in the trackers.
        log: called with each Record, on the main process, instead of
            `accelerator.log(record.scalars(prefix), step=record.step)`.
        options: those of `geomwatch.Monitor`.

    Raises:
        UsageError: (a ValueError) model or optimizer are not prepared, don't belong together, are
            watched already or can't be; the processes share the model otherwise than by
            DistributedDataParallel or FSDP2; or an option can't work.
    """
    check_prepared(accelerator, model, loss_fn, optimizer)
    return AcceleratedMonitor(accelerator, model, loss_fn, optimizer, prefix, log, **options)


class AcceleratedMonitor(Monitor):
    """The Monitor of a loop on accelerate; `watch` makes it.

    It learns from the accelerator which micro-batch completes a gradient, the norm before
    `accelerator.clip_grad_norm_`, and what a GradScaler has the gradients multiplied by.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Any,
        prefix: str,
        log: Callable[[Record], None] | None,
        **options: Unpack[Options],
    ) -> None:
        how = check_how(options.get("how"))
        options["how"] = replace(how, also=(*how.also, *captured_by(loss_fn)))
        self._each = EachAlike(loss_fn)
        trained = model if accelerator.num_processes > 1 else bare(accelerator, model)
        super().__init__(trained, self._each, unwrap(optimizer), **options)
        if options.get("controllers"):
            self.equip(*actuators_of(accelerator))
        self._accelerator = accelerator
        self._prefix, self._log = prefix, log
        self._losses: list[Tensor | float | None] = []  # of the window so far
        self._clipped: _Clipped | None = None
        self._before: int | None = accelerator.step  # micro-batches before the first window
        self._ties = None if self._disabled else Ties.of(accelerator)
        if self._ties is not None:
            self._ties.add(self)

    def observe(self, batch: Any) -> None:
        """Note a micro-batch that is not passed to `step`."""
        super().observe(self._each.micro_batch(batch))

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
        if self._disabled:
            return None
        if batch is not None:
            self.observe(batch)
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if not self._called:
            self._check_loop()
        if not self._accelerator.sync_gradients:
            return None
        losses, self._losses = self._losses, []
        record = super().step(
            loss=_mean(losses),
            grad_norm=self._raw_norm() if grad_norm is None else grad_norm,
            grad_scale=self._scale() if grad_scale == 1 else grad_scale,
        )
        if record is not None:
            self._track(record)
        return record

    def close(self) -> None:
        """Judge the last step and leave optimizer, accelerator and sinks."""
        super().close()
        if self._ties is not None:
            self._ties.remove(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another monitor of the same run stopped.

        Raises:
            UsageError: it was saved with other rules.
        """
        super().load_state_dict(state)
        self._before = None  # the accelerator's own count is loaded next

    def watches(self, optimizer: object) -> bool:
        """Tell whether it is this optimizer's monitor."""
        return optimizer is self._optimizer

    def note_clipped(
        self, parameters: Sequence[Tensor], norm: Tensor | float, norm_type: float
    ) -> None:
        """Take note of a call of `accelerator.clip_grad_norm_` and of the norm it returned."""
        clipped = {id(p) for p in parameters if p.grad is not None}
        own = [p for p in self.params if p.grad is not None]
        if clipped.isdisjoint(map(id, own)):  # another model's
            return
        # Clipped in parts, or by another norm, it is read off the gradients as they are then.
        whole = norm_type == 2 and clipped == set(map(id, own))
        self._clipped = _Clipped.now(own, norm) if whole else None

    def _check_loop(self) -> None:
        if not self._counter.has_gradient():
            raise UsageError(f"monitor.step() must find gradients, got none. {PLACE}")
        if self._counter.gradient_is_used_up():
            raise UsageError(
                "monitor.step() must come before optimizer.step(), got a gradient that it has "
                f"stepped with already. {PLACE}"
            )
        if self._before is None:
            self._before = self._accelerator.step - 1
        if self._accelerator.sync_gradients:
            seen = max(len(self._losses), len(self._window))
            check_window(self._accelerator, before=self._before, seen=seen)

    def _raw_norm(self) -> Tensor | float | None:
        clipped, self._clipped = self._clipped, None
        return clipped.norm if clipped is not None and clipped.is_present() else None

    def _scale(self) -> float:
        """What the gradients are multiplied by; 1 where clipping has unscaled them already."""
        scaler = self._accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return 1.0
        state = scaler._per_optimizer_states.get(id(self._optimizer))
        if state is not None and state["stage"] is not OptState.READY:
            return 1.0
        return float(scaler.get_scale())  # a host sync, shortly before that of scaler.step()

    def _track(self, record: Record) -> None:
        try:
            if self._log is not None:
                if self._accelerator.is_main_process:
                    self._log(record)
                return
            prefix = f"{self._prefix}{self.name}/" if self.name else self._prefix
            self._accelerator.log(record.scalars(prefix), step=record.step)
        except Exception as error:  # a tracker that is down must not stop a training run
            self._watch.prober.tell(
                f"a record could not be logged: {type(error).__name__}: {error}. Training goes on."
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Clipped:
    """The norm of a gradient before clipping, and how to know that gradient again."""

    norm: Tensor | float
    param: Tensor
    gradient: Tensor  # itself, not its id: ids of freed tensors are used again
    version: int

    @classmethod
    def now(cls, params: Sequence[Tensor], norm: Tensor | float) -> _Clipped:
        """Note the smallest gradient as it is now, since it is kept alive."""
        param = min(params, key=lambda p: p.numel())
        assert param.grad is not None
        return cls(norm, param, param.grad, param.grad._version)

    def is_present(self) -> bool:
        """Tell whether it is what the coming step will use: clipping may come after a probe."""
        return self.param.grad is self.gradient and self.gradient._version == self.version


def _mean(losses: Sequence[Tensor | float | None]) -> Tensor | float | None:
    """The loss that accelerate steps on, unless one of the micro-batches came without its own."""
    known = [loss for loss in losses if loss is not None]
    return sum(known[1:], known[0]) / len(known) if known and len(known) == len(losses) else None
