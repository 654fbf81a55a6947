"""Optimizer steps, counted as they are taken."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.monitoring.scalars import Arriving


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
        self._left_out: Arriving | None = None  # above 0 if the last step was, as the device knows
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
        self._left_out = None if found_inf is None else Arriving(found_inf)
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
