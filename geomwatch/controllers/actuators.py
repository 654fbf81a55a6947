"""What a loop lets us turn: the learning rates of its steps, its clipping, its batch size.

An actuator belongs to one loop. These work in any torch loop; hosts bring their own for clipping
and batch size (see docs/control.md for what each can change while it runs).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geomwatch.observation.margins import within
from geomwatch.stability.registry import learning_rates

LR, BATCH, CLIP, SKIP = "lr_scale", "batch_scale", "clip_norm", "skip_step"
KNOBS = (LR, BATCH, CLIP, SKIP)  # in the order in which controllers get their turn

NEUTRAL = {LR: math.inf, BATCH: 1.0, CLIP: math.inf, SKIP: 0.0}  # settings that change nothing

NO_BATCH = (
    "This loop's batches are its own: pass BatchSizeScaler(through=...) a ResizableBatchSampler "
    "that its DataLoader draws from, or an Accumulation"
)


class Actuator:
    """One knob of one loop: a host's own say in `set`, `refresh` and `close` what turning it means.

    Args:
        knob: one of `KNOBS`.
        obstacle: why this loop can't change it while it runs; "" if it can.
    """

    def __init__(self, knob: str, *, obstacle: str = "") -> None:
        self.knob = knob
        self._obstacle = obstacle
        self.setting = NEUTRAL[knob]  # what it was last turned to

    @property
    def obstacle(self) -> str:
        """Why this loop can't change it while it runs; "" if it can."""
        return self._obstacle

    def set(self, to: float) -> None:
        """Turn the knob; a loop may have to wait for a moment that corrupts nothing."""
        self.setting = to

    def lift(self) -> None:
        """Make way for a look at the coming step; called before each."""

    def value(self, rates: Sequence[float]) -> float:
        """Return what the knob says for the coming step, at the user's learning `rates`.

        A tracker gets to see it: a factor of the rate, a multiple of the batch, a gradient norm.
        """
        return self.setting

    def refresh(self) -> None:
        """Make a change that had to wait; called once a step, after `set`."""

    def close(self) -> None:
        """Put the loop back as it was."""


class Memory(Actuator):
    """A knob that nothing hangs on: of a dry run, or of a loop that can't turn it."""

    def lift(self) -> None:
        """Forget what would have held for one step."""
        self.setting = NEUTRAL[SKIP] if self.knob == SKIP else self.setting


class LearningRate(Actuator):
    """Keeps the rates of a torch optimizer below a cap, for the duration of each step alone.

    The hooks that surround `optimizer.step()` multiply the rate of all groups by one factor,
    min(1, cap / largest rate), and put the user's rates back; whoever looks at any other time,
    a scheduler, a logger, a checkpoint, sees those. A step that a GradScaler leaves out runs no
    hook. Decoupled weight decay scales along, as lr * weight_decay.

    After an exception inside `optimizer.step()` the rates are back at the next step, call of the
    monitor or `state_dict()`. The cap is in units of the largest rate among the groups; one that is
    set inside a step takes effect at `refresh`.

    Args:
        optimizer: a torch optimizer, not a host's wrapper of one.
        live: set the hooks; otherwise it only tells the factor, as a dry run needs it.
    """

    def __init__(self, optimizer: Any, *, live: bool = True) -> None:
        super().__init__(LR, obstacle=no_hooks(optimizer) if live else "")
        self._optimizer = optimizer
        # group, the user's rate, factor: what a step under way was lent; None outside of steps
        self._lent: list[tuple[dict[str, Any], Any, float]] | None = None
        self._handles: list[Any] = []
        if live and not self.obstacle:
            before, after = calling(self, "_lend"), calling(self, "_restore")
            self._handles = [
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
                optimizer.register_state_dict_pre_hook(after),
            ]
            for handle in self._handles:
                weakref.finalize(self, handle.remove)

    def value(self, rates: Sequence[float]) -> float:
        """Return the factor that rates are multiplied by."""
        return within(self.setting, rates)

    def lift(self) -> None:
        """Give the user's rates back inside a step, as when a closure calls the monitor."""
        if self._lent is not None:
            self._restore()
            self._lent = []

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

    def _lend(self) -> None:
        self._restore()  # also what an exception has left of the step before
        scale = self.value(learning_rates(self._optimizer)) if self.setting < math.inf else 1.0
        groups = self._optimizer.param_groups if scale < 1 else []
        # all are copied before one is written: groups may share a tensor
        self._lent = [(g, _copy(g["lr"]), scale) for g in groups if g.get("lr") is not None]
        for group, own, _ in self._lent:
            _write(group, own * scale)

    def _restore(self) -> None:
        for group, own, scale in self._lent or ():
            present = group.get("lr")
            # a tensor may be of a captured step, which a comparison would wait for; another number
            # was set inside the step and is somebody's own
            if isinstance(present, Tensor) or present == own * scale:
                _write(group, own)
        self._lent = None


class StepClip(Actuator):
    """Clips the norm of all gradients of a torch optimizer, just before it steps with them.

    After the clipping of the loop itself, and by `torch.nn.utils.clip_grad_norm_`. Of no use to an
    optimizer that computes its gradients in a closure: it steps with those.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(CLIP, obstacle=no_hooks(optimizer))
        self._optimizer = optimizer
        hook = calling(self, "_clip")
        self._handle = None if self.obstacle else optimizer.register_step_pre_hook(hook)
        if self._handle is not None:
            weakref.finalize(self, self._handle.remove)

    def close(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()

    def _clip(self) -> None:
        if self.setting == math.inf:
            return
        groups = self._optimizer.param_groups
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        # fused optimizers divide by a GradScaler's scale themselves
        scale = getattr(self._optimizer, "grad_scale", None)
        norm = self.setting if scale is None else self.setting * float(scale)
        torch.nn.utils.clip_grad_norm_(params, norm)


def calling(actuator: object, name: str) -> Callable[..., None]:
    """Return a hook that holds the actuator weakly; one that is forgotten does nothing."""
    me = weakref.ref(actuator)

    def hook(*_: object) -> None:
        alive = me()
        if alive is not None:
            getattr(alive, name)()

    return hook


def no_hooks(optimizer: object) -> str:
    """Return why nothing can be done around this optimizer's steps; "" where something can."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return ""
    return (
        f"{type(optimizer).__name__} has no step hooks, so that its rates can't be lowered for the "
        "duration of a step"
    )


def _copy(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate


def _write(group: dict[str, Any], rate: Any) -> None:
    """Set the rate of a group, of a tensor in place."""
    if isinstance(group["lr"], Tensor):
        with torch.no_grad():
            group["lr"].copy_(torch.as_tensor(rate))
    else:
        group["lr"] = rate
