"""What a loop lets us turn: the learning rates of its steps, its clipping, its batch size.

An actuator belongs to one loop. These work in any torch loop; hosts bring their own for clipping
and batch size (see docs/control.md for what each can change while it runs).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from geomwatch.stability.problem import learning_rates

LR, BATCH, CLIP = "lr_scale", "batch_scale", "clip_norm"
KNOBS = (LR, BATCH, CLIP)  # in the order in which controllers get their turn

NEUTRAL = {LR: math.inf, BATCH: 1.0, CLIP: math.inf}  # settings that change nothing

NO_BATCH = (
    "This loop's batches are its own: pass BatchSizeScaler(through=...) a ResizableBatchSampler "
    "that its DataLoader draws from, or an Accumulation"
)


class Actuator(Protocol):
    """One knob of one loop. Its value is what a tracker gets to see."""

    knob: str

    @property
    def obstacle(self) -> str:
        """Why this loop can't change it while it runs; "" if it can."""

    def set(self, to: float) -> None:
        """Turn the knob; a loop may have to wait for a moment that corrupts nothing."""

    def value(self, rates: Sequence[float]) -> float:
        """Return what the knob says for the coming step, at the user's learning `rates`."""

    def refresh(self) -> None:
        """Called once a step, after `set`: a moment to make a change that had to wait."""

    def close(self) -> None:
        """Put the loop back as it was."""


@dataclass(slots=True)
class _Lent:
    """The rates of the user, while the optimizer steps with others."""

    base: list[Any]
    applied: list[Any]


class LearningRate:
    """Keeps the rates of a torch optimizer below a cap, for the duration of each step alone.

    The hooks that surround `optimizer.step()` multiply the rate of all groups by one factor,
    min(1, cap / largest rate), and put the user's rates back; whoever looks at any other time,
    a scheduler, a logger, a checkpoint, sees those. A step that a GradScaler leaves out runs no
    hook. Decoupled weight decay scales along, as lr * weight_decay.

    After an exception inside `optimizer.step()` the rates are back at the next step, call of the
    monitor or `state_dict()`. `cap` is in units of the largest rate among the groups.
    """

    knob = LR

    def __init__(self, optimizer: Any, *, live: bool = True) -> None:
        self.cap = math.inf
        self._optimizer = optimizer
        self._lent: _Lent | None = None
        self._lifted = False
        self._handles = list(_hooks(optimizer, self)) if live else []
        self.obstacle = "" if self._handles or not live else _no_hooks(optimizer)

    def set(self, to: float) -> None:
        """Set the cap; inside a step it takes effect at `refresh`."""
        self.cap = to

    def value(self, rates: Sequence[float]) -> float:
        """Return the factor that rates are multiplied by."""
        largest = max(rates, default=0.0)
        return 1.0 if largest <= self.cap or largest <= 0 else self.cap / largest

    def lift(self) -> None:
        """Give the user's rates back inside a step, as when a closure calls the monitor."""
        if self._lent is not None and not self._lifted:
            _write(self._groups, self._lent.base, unless_changed_from=self._lent.applied)
            self._lifted = True

    def refresh(self) -> None:
        """Apply the present cap to the step that is under way, if any."""
        if self._lent is not None:
            self._lend()

    def close(self) -> None:
        """Give the rates back and take the hooks off."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        return groups

    def _before(self) -> None:
        self._restore()  # of a step that an exception has ended
        self._lend()

    def _lend(self) -> None:
        self._restore()
        rates = learning_rates(self._optimizer) if self.cap < math.inf else ()
        scale = self.value(rates)
        base: list[Any] = []
        if scale < 1:
            base = [_copy(group.get("lr")) for group in self._groups]
        applied = [None if rate is None else rate * scale for rate in base]
        _write(self._groups, applied)
        self._lent = _Lent(base, applied)  # even if empty: a step is under way

    def _restore(self) -> None:
        if self._lent is not None and not self._lifted:
            _write(self._groups, self._lent.base, unless_changed_from=self._lent.applied)
        self._lent, self._lifted = None, False


class Memory:
    """A knob that nothing hangs on: of a dry run, or of a loop that can't turn it."""

    def __init__(self, knob: str, *, obstacle: str = "") -> None:
        self.knob = knob
        self.obstacle = obstacle
        self._value = NEUTRAL[knob]

    def set(self, to: float) -> None:
        """Remember a value."""
        self._value = to

    def value(self, rates: Sequence[float]) -> float:
        """Return it."""
        return self._value

    def refresh(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class StepClip:
    """Clips the norm of all gradients of a torch optimizer, just before it steps with them.

    After the clipping of the loop itself, and by `torch.nn.utils.clip_grad_norm_`. Of no use to an
    optimizer that computes its gradients in a closure: it steps with those.
    """

    knob = CLIP

    def __init__(self, optimizer: Any) -> None:
        self._norm = math.inf
        self._optimizer = optimizer
        has_hooks = hasattr(optimizer, "_optimizer_step_pre_hooks")
        self.obstacle = "" if has_hooks else _no_hooks(optimizer)
        hook = _calling(self, "_clip")
        self._handle = optimizer.register_step_pre_hook(hook) if has_hooks else None

    def set(self, to: float) -> None:
        """Clip at this norm; at infinity not at all."""
        self._norm = to

    def value(self, rates: Sequence[float]) -> float:
        """Return the norm."""
        return self._norm

    def refresh(self) -> None:
        """Do nothing: the next step finds the norm."""

    def close(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()

    def _clip(self) -> None:
        if self._norm == math.inf:
            return
        groups = self._optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        # fused optimizers divide by a GradScaler's scale themselves
        scale = getattr(self._optimizer, "grad_scale", None)
        norm = self._norm if scale is None else self._norm * float(scale)
        torch.nn.utils.clip_grad_norm_(params, norm)


def _hooks(optimizer: Any, actuator: LearningRate) -> Iterator[Any]:
    """Register what surrounds a step."""
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return
    yield optimizer.register_step_pre_hook(_calling(actuator, "_before"))
    yield optimizer.register_step_post_hook(_calling(actuator, "_restore"))
    yield optimizer.register_state_dict_pre_hook(_calling(actuator, "_restore"))


def _calling(actuator: object, name: str) -> Callable[..., None]:
    """Return a hook that holds the actuator weakly; one that is forgotten does nothing."""
    me = weakref.ref(actuator)

    def hook(*_: object) -> None:
        alive = me()
        if alive is not None:
            getattr(alive, name)()

    return hook


def _no_hooks(optimizer: object) -> str:
    return (
        f"{type(optimizer).__name__} has no step hooks, so that its rates can't be lowered for the "
        "duration of a step"
    )


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _write(
    groups: Sequence[dict[str, Any]],
    rates: Sequence[Any],
    *,
    unless_changed_from: Sequence[Any] | None = None,
) -> None:
    """Write the rates of groups, tensors in place; not those that somebody else has changed."""
    expected = [None] * len(rates) if unless_changed_from is None else unless_changed_from
    with torch.no_grad():
        for group, rate, written in zip(groups, rates, expected, strict=False):
            present = group.get("lr")
            if rate is None or present is None:
                continue
            if isinstance(present, Tensor):  # also of a captured step; compared it would wait
                present.copy_(torch.as_tensor(rate))
            elif unless_changed_from is None or present == written:
                group["lr"] = rate
