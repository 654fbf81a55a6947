"""Loss and gradient norm of each step, read one step late so that no device is waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.findings import Present
from geomwatch.observation.step import Settled
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import whole


def check_scalar(value: object) -> None:
    """Refuse what is no scalar where the loss of a step or the norm of its gradient is passed.

    Raises:
        UsageError: it is none.
    """
    if value is None or isinstance(value, int | float):
        return
    if isinstance(value, Tensor):
        size, found = value.numel(), f"shape {tuple(value.shape)}"
    else:  # of NumPy, say
        size = getattr(value, "size", 1) if hasattr(value, "__float__") else 0
        found = f"{value!r:.60}"
    if size == 1:
        return
    raise UsageError(
        f"loss and grad_norm must be scalars in monitor.step(), got {found}. Pass the mean that "
        "backward() was called on."
    )


class Arriving:
    """A number on its way from a device to the host.

    It is copied without waiting where the device has streams and events, as CUDA's and XPU's have;
    of others it is kept there, and read a step later.
    """

    def __init__(self, value: Tensor | float) -> None:
        check_scalar(value)
        if isinstance(value, Tensor):
            value = whole(value.detach()).reshape(())  # FSDP2's clip_grad_norm_ returns a DTensor
        self._arrived: Any = None  # an event
        self._value: Tensor | float
        self.is_here = not isinstance(value, Tensor) or value.is_cpu  # the host need not wait
        if not isinstance(value, Tensor) or self.is_here:
            self._value = float(value)
            return
        device: Any = torch.get_device_module(value.device)
        if not (hasattr(device, "Event") and hasattr(device, "current_stream")):
            self._value = value.clone()
            return
        host = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._value = host.copy_(value, non_blocking=True)
        self._arrived = device.Event()
        self._arrived.record(device.current_stream(value.device))  # not of the current device

    def __call__(self) -> float:
        """Return it, once it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


class _Mean:
    """The loss of all ranks, from its sum and the number of ranks that have one."""

    def __init__(self, sum_and_count: Tensor) -> None:
        self._total, self._count = Arriving(sum_and_count[0]), Arriving(sum_and_count[1])
        self.is_here = self._total.is_here

    def __call__(self) -> float | None:
        number = self._count()
        return self._total() / number if number else None


Late: TypeAlias = float | Arriving | _Mean | None  # a number that is here, or on its way, or none


def _on_host(value: Tensor | float | None) -> float | None:
    if type(value) is Tensor and value.is_cpu and value.numel() == 1:
        return float(value.item())
    return float(value) if isinstance(value, float | int) else None


def arriving(value: Tensor | float | None) -> Late:
    """Return a scalar as a number, or start to copy it to the host.

    Raises:
        UsageError: it is none.
    """
    known = _on_host(value)
    return Arriving(value) if known is None and value is not None else known


def checked(
    loss: Tensor | float | None, grad_norm: Tensor | float | None
) -> tuple[Tensor | float | None, Tensor | float | None]:
    """Return both, None for what is no scalar."""
    found: list[Tensor | float | None] = []
    for value in (loss, grad_norm):
        try:
            check_scalar(value)
        except UsageError:
            value = None
        found.append(value)
    return found[0], found[1]


def _is_here(late: Late) -> bool:
    return not isinstance(late, Arriving | _Mean) or late.is_here


def _arrived(late: Late) -> float | None:
    return late() if isinstance(late, Arriving | _Mean) else late


class Noted(NamedTuple):
    """The scalars of a step, which may be on their way to the host."""

    step: int  # optimizer steps taken before it
    loss: Late
    grad_norm: Late

    def settled(self, steps: int) -> Settled:
        """Wait for them, now that the optimizer has taken so many steps."""
        loss, norm = _arrived(self.loss), _arrived(self.grad_norm)
        return Settled(self.step, loss, norm, stepped=steps > self.step)

    def present(self, *, wait: bool = False) -> Present:
        """Return what the host knows already, or what it knows if it may `wait` for the device.

        It does wait for the norm where the loss is not finite.
        """
        loss = _arrived(self.loss) if wait or _is_here(self.loss) else None
        waits = wait or (loss is not None and not math.isfinite(loss))
        norm = _arrived(self.grad_norm) if waits or _is_here(self.grad_norm) else None
        return Present(loss, norm)


class StepScalars(Resumable):
    """Loss and gradient norm of each step, copied asynchronously and read one step later.

    On a GPU reading a scalar at once would stall the host until the device has caught up; a step
    later the copy has long arrived.
    """

    pending: Kept[tuple[int, float | None, float | None] | None]  # as numbers, while it is saved

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks or Ranks()  # over which the loss is averaged
        self.last: Noted | None = None
        self.pending = None

    def loss(self, loss: Tensor | float | None) -> Late:
        """Start to copy the loss of a step, the mean over the ranks that have one."""
        if self._ranks.size == 1:
            return arriving(loss)
        check_scalar(loss)  # before the others wait for it
        mean = _Mean(self._ranks.sum_and_count(loss))
        return mean() if mean.is_here else mean

    def put(self, steps: int, loss: Late, grad_norm: Late) -> Noted:
        """Note both; `steps` is the number of steps the optimizer has taken."""
        self.last = Noted(steps, loss, grad_norm)
        return self.last

    def take(self, steps: int) -> Settled | None:
        """Read what `put` left, now that the optimizer has taken `steps` steps."""
        last, self.last = self.last, None
        return None if last is None else last.settled(steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what is pending, as numbers."""
        last = self.last
        self.pending = last and (last.step, _arrived(last.loss), _arrived(last.grad_norm))
        return super().state_dict()

    def resumed(self) -> None:
        """Wait for what was pending."""
        self.last = None if self.pending is None else Noted(*self.pending)


def gradient_norm(params: Sequence[Tensor]) -> Tensor:
    """Return the norm of the gradient the step will use, without a host sync.

    Where its square overflows it is the largest entry, a lower bound: it is large, and not lost.
    """
    gradients = [_values(p.grad) for p in params if p.grad is not None]
    if all(type(g) is Tensor for g in gradients) and len({g.device for g in gradients}) == 1:
        # get_total_norm sorts by device and dtype first, which costs more than the norm itself.
        total = _norm(gradients, 2)
        if total.is_cpu and math.isfinite(float(total)):
            return total
        return torch.where(total == math.inf, _norm(gradients, math.inf), total)
    return whole(torch.nn.utils.get_total_norm(gradients))


def _norm(gradients: list[Tensor], order: float) -> Tensor:
    norms: list[Tensor] = list(torch._foreach_norm(gradients, order))
    total: Tensor = torch.stack(norms).norm(order)
    return total


def _values(gradient: Tensor) -> Tensor:
    """Return the entries of a gradient, which an embedding may keep sparse."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient
