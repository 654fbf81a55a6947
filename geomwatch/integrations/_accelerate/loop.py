"""What a loop on accelerate is about to step with: its window, its norm, its scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

from geomwatch.curvature.objective import LossFn
from geomwatch.integrations._accelerate.actuators import actuators_of
from geomwatch.integrations._accelerate.check import PLACE, bare, check_window
from geomwatch.integrations._accelerate.ties import Ties
from geomwatch.integrations._host.loss import HostLoss, mean_of
from geomwatch.integrations._host.options import MonitorOptions
from geomwatch.integrations._host.watch import HostWatch
from geomwatch.isolation.reach import captured_by
from geomwatch.monitoring.face import is_disabled
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Record
from geomwatch.stability.problem import unwrap


class LoopLoss(HostLoss):
    """The user's loss_fn on the micro-batches of `accelerator.backward`.

    A piece of a micro-batch counts by its share of the items, or of what `loss_fn.weight(batch)`
    says.
    """

    __slots__ = ()
    given: LossFn

    def __init__(self, loss_fn: LossFn) -> None:
        weigh = getattr(loss_fn, "weight", None)  # of a loss module it may be a tensor
        super().__init__(loss_fn, weigh if callable(weigh) else None)

    def evaluate(self, model: nn.Module, batch: Any, call: None, share: float) -> Tensor:
        """Return the loss of a micro-batch, or of the user's own probe batch."""
        return self.given(model, batch)

    def isolates(self) -> list[object]:
        """Return what the user's function carries along."""
        return captured_by(self.given)


class LoopWatch(HostWatch[LoopLoss]):
    """Gathers the micro-batches of a window, as the accelerator counts them.

    Raises:
        UsageError: an option can't work.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        loss_fn: LossFn,
        optimizer: Any,
        options: MonitorOptions,
    ) -> None:
        loss = LoopLoss(loss_fn)
        trained = model if accelerator.num_processes > 1 else bare(accelerator, model)
        self.optimizer = unwrap(optimizer)
        monitor = options.monitor(
            trained,
            loss,
            self.optimizer,
            actuators=lambda: actuators_of(accelerator),
            of_one_run=True,
        )
        super().__init__(monitor, loss, Ranks.of(trained))
        self._ties = None if is_disabled() else Ties.of(accelerator)
        if self._ties is not None:
            self._ties.add(self)
        self._accelerator = accelerator
        self._losses: list[Tensor | float | None] = []  # of the window so far,
        self._observed = 0  # and its micro-batches
        self._clipped: _Clipped | None = None
        self._before: int | None = accelerator.step  # micro-batches before the first window

    def observe(self, batch: Any) -> None:
        """Note a micro-batch that is not passed to `step`."""
        self._observed += 1
        self.monitor.observe(self.loss.micro_batch(batch))

    def watch_micro_batch(
        self,
        batch: Any,
        loss: Tensor | float | None,
        grad_norm: Tensor | float | None,
        grad_scale: float,
    ) -> Record | None:
        """Watch a micro-batch; the last one of a window is an optimizer step.

        Raises:
            UsageError: at the first calls, when they are made in the wrong place.
        """
        if self._ties is None:
            return None
        if batch is not None:
            self.observe(batch)
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
        if not self.is_checked:
            self._check_place()
        if not self._accelerator.sync_gradients:
            return None
        losses, self._losses, self._observed = self._losses, [], 0
        record = self.monitor.step(
            loss=mean_of(losses),
            grad_norm=self._norm_before_clipping() if grad_norm is None else grad_norm,
            grad_scale=self._scale() if grad_scale == 1 else grad_scale,
        )
        self.is_checked = True
        return record

    def close(self) -> None:
        """Judge the last step and leave optimizer, accelerator and sinks."""
        super().close()
        if self._ties is not None:
            self._ties.remove(self)

    def checkpoint_comes(self) -> None:
        """Hear that the accelerator is about to load a checkpoint, its own count with it."""
        self._before = None

    def clipped(self, parameters: Iterable[Tensor], norm: Tensor | float, norm_type: float) -> None:
        """Take note of a call of `accelerator.clip_grad_norm_` and of the norm it returned."""
        clipped = {id(p) for p in parameters if p.grad is not None}
        own = [p for p in self.monitor.params if p.grad is not None]
        if clipped.isdisjoint(map(id, own)):  # another model's
            return
        # Clipped in parts, or by another norm, it is read off the gradients as they are then.
        whole = norm_type == 2 and clipped == set(map(id, own))
        self._clipped = _Clipped.now(own, norm) if whole else None

    def _check_place(self) -> None:
        self.monitor.check_gradient(PLACE)
        if self._before is None:
            self._before = self._accelerator.step - 1
        if self._accelerator.sync_gradients:
            seen = max(len(self._losses), self._observed)
            check_window(self._accelerator, before=self._before, seen=seen)

    def _norm_before_clipping(self) -> Tensor | float | None:
        clipped, self._clipped = self._clipped, None
        return clipped.norm if clipped is not None and clipped.is_present() else None

    def _scale(self) -> float:
        """What the gradients are multiplied by; 1 where clipping has unscaled them already."""
        scaler = self._accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return 1.0
        state = scaler._per_optimizer_states.get(id(self.optimizer))
        if state is not None and state["stage"] is not OptState.READY:
            return 1.0
        return float(scaler.get_scale())  # a host sync, shortly before that of scaler.step()


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
