"""What happens between probes: optimizer steps counted, two scalars read one step late."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from geomwatch.errors import UsageError
from geomwatch.isolation.random_state import RandomState
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.findings import Present
from geomwatch.observation.step import Settled
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import whole


class StepCounter(Resumable):
    """Counts the steps an optimizer really takes, through its own post-step hook.

    A fused optimizer under a GradScaler is called in any case, and leaves out by itself a step
    whose gradient is not finite; it holds `found_inf` while it does.
    """

    steps: Kept[int]

    def __init__(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        self.steps = 0
        self.changed = ""  # between the last `see` and its step: what
        self._handles: list[Any] = []
        self.follow(optimizer, params)

    def follow(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        """Count the steps of this optimizer from now on, of these parameters."""
        self.close()
        self._params = params
        self._witness = min(params, key=lambda p: p.numel())
        # The gradient object itself is kept, not its id: ids of freed tensors are used again.
        self._used: tuple[Tensor, int] | None = None
        self._seen: tuple[Tensor | None, int, int] | None = None
        self._left_out: _Scalar | None = None  # above 0 if the last step was, as the device knows
        if hasattr(optimizer, "register_step_post_hook"):
            # A weak reference: the optimizer must not keep a forgotten monitor alive.
            me = weakref.ref(self)

            def compare(*_: object) -> None:
                counter = me()
                if counter is not None:
                    counter.compare()

            def count(stepped: Any, *_: object) -> None:
                counter = me()
                if counter is not None:
                    counter.count(getattr(stepped, "found_inf", None))

            self._handles = [
                optimizer.register_step_pre_hook(compare),
                optimizer.register_step_post_hook(count),
            ]
            for handle in self._handles:
                weakref.finalize(self, handle.remove)

    @property
    def is_automatic(self) -> bool:
        """Whether the optimizer tells of its steps; otherwise call `count` for each."""
        return bool(self._handles)

    def see(self, *, will_step: bool = True) -> None:
        """Remember gradient and weights as they are, to know whether the step is taken with them.

        An integer or two of the smallest parameter stand for all. Of a step that will be left out
        nothing is to be compared.
        """
        self._seen = self._present() if will_step else None

    def compare(self) -> None:
        """Note, right before the step, what was changed since `see`."""
        if self._seen is None or self.changed:
            return
        gradient, version, weights = self._present()
        if gradient is not self._seen[0] or version != self._seen[1]:
            self.changed = "gradient"
        elif weights != self._seen[2]:
            self.changed = "weights"

    def _present(self) -> tuple[Tensor | None, int, int]:
        gradient = self._witness.grad
        return gradient, -1 if gradient is None else gradient._version, self._witness._version

    @property
    def is_sure(self) -> bool:
        """Whether the last step was taken, as far as it was counted."""
        return self._left_out is None

    def count(self, found_inf: Any = None) -> None:
        """Count one step, unless an infinite gradient was found."""
        self.settle()
        self.steps += 1
        self._left_out = None if found_inf is None else _Scalar(found_inf)
        gradient = self._witness.grad
        self._used = None if gradient is None else (gradient, gradient._version)
        self._seen = None

    def settle(self) -> None:
        """Take back the last step if it turns out to have been left out."""
        if self._left_out is not None:
            self.steps -= self._left_out() > 0
            self._left_out = None

    def gradient_is_used_up(self) -> bool:
        """Tell whether the present gradient is the one the optimizer has stepped with already."""
        if self._used is None:
            return False
        gradient, version = self._used
        return self._witness.grad is gradient and gradient._version == version

    def has_gradient(self) -> bool:
        """Tell whether any parameter has a gradient."""
        return any(p.grad is not None for p in self._params)

    def close(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


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


class _Scalar:
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
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._value)


class _Mean:
    """The loss of all ranks, from its sum and the number of ranks that have one."""

    def __init__(self, sum_and_count: Tensor) -> None:
        self._total, self._count = _Scalar(sum_and_count[0]), _Scalar(sum_and_count[1])
        self.is_here = self._total.is_here

    def __call__(self) -> float | None:
        number = self._count()
        return self._total() / number if number else None


Late: TypeAlias = float | _Scalar | _Mean | None  # a number that is here, or on its way, or none


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
    return _Scalar(value) if known is None and value is not None else known


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
    return not isinstance(late, _Scalar | _Mean) or late.is_here


def _arrived(late: Late) -> float | None:
    return late() if isinstance(late, _Scalar | _Mean) else late


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


def fixed_window(source: Any) -> list[Any]:
    """Return the batches to average over: all of a DataLoader's, or the one batch; none for None.

    A loader is read once, and the random generators it draws from are put back.

    Raises:
        UsageError: the loader has no batches.
    """
    if source is None:
        return []
    if not isinstance(source, DataLoader):
        return [source]
    before = RandomState()
    try:
        window = list(source)
    finally:
        before.restore()
    if not window:
        raise UsageError("batch must hold data, got a DataLoader without batches.")
    return window
