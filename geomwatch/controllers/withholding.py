"""Leaves one step of a torch optimizer out, as if its batch had not been drawn."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from geomwatch.controllers.actuators import SKIP, Actuator, calling, no_hooks
from geomwatch.errors import UsageError


class StepSkip(Actuator):
    """Takes the gradients away for the duration of one step, and puts them back.

    A torch optimizer passes over a parameter without a gradient: neither the weights nor a moment
    nor a count of its state change, nor does weight decay act. Numbers that an optimizer of another
    library counts in its groups are put back, but for the rate. Hooks surround `optimizer.step()`;
    where the loop calls the monitor inside of it, in a closure, the gradients go at `refresh`. It
    holds for one step: what a GradScaler leaves out by itself is forgotten at the next call.

    Raises:
        UsageError: the optimizer has no step hooks, or evaluates its gradients again (LBFGS).
    """

    def __init__(self, optimizer: Any) -> None:
        kind = type(optimizer).__name__
        if no_hooks(optimizer) or kind == "LBFGS":
            why = "evaluates its gradients again" if kind == "LBFGS" else "has no step hooks"
            raise UsageError(
                f"SkipStep must be able to leave a step out, got {kind}, which {why}. Leave it out "
                "of controllers."
            )
        super().__init__(SKIP)
        self._optimizer = optimizer
        self._inside = False
        self._withheld: list[tuple[Tensor, Tensor]] = []  # parameter, gradient
        self._numbers: list[tuple[dict[str, Any], dict[str, Any]]] = []  # group, its numbers
        self._handles = [
            optimizer.register_step_pre_hook(calling(self, "_enter")),
            optimizer.register_step_post_hook(calling(self, "_leave")),
        ]
        for handle in self._handles:
            weakref.finalize(self, handle.remove)

    def lift(self) -> None:
        """Forget what was asked for the step before; called before each step is looked at."""
        self._restore()
        self.setting = 0.0

    def refresh(self) -> None:
        """Take the gradients of a step that is under way."""
        if self._inside and self.setting and not self._withheld:
            self._withhold()

    def close(self) -> None:
        """Give the gradients back and take the hooks off."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def _enter(self) -> None:
        self._restore()  # also what an exception has left of the step before
        self._inside = True
        self.refresh()

    def _leave(self) -> None:
        self._restore()
        self._inside, self.setting = False, 0.0

    def _withhold(self) -> None:
        for group in self._optimizer.param_groups:
            kept = {k: v for k, v in group.items() if isinstance(v, int | float) and k != "lr"}
            self._numbers.append((group, kept))
            for param in group["params"]:
                if param.grad is not None:
                    self._withheld.append((param, param.grad))
                    param.grad = None

    def _restore(self) -> None:
        for param, gradient in self._withheld:
            param.grad = gradient
        for group, numbers in self._numbers:
            group.update(numbers)
        self._withheld, self._numbers = [], []
