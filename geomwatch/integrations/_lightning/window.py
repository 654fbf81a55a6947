"""The batches that the gradient of an optimizer is made of, and the steps it takes with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from geomwatch.errors import UsageError
from geomwatch.integrations._host.loss import mean_of
from geomwatch.integrations._lightning.tap import StepCall
from geomwatch.monitoring.scalars import gradient_norm
from geomwatch.sinks.log import logger

_LONGEST = 64  # batches that a module may accumulate by hand


class Window:
    """The calls of training_step since the last step of an optimizer, whose steps it counts."""

    def __init__(self, trainer: Any, optimizer: Any) -> None:
        self.calls: list[StepCall] = []
        self._told = False
        self._announced = 0  # steps that Lightning told of,
        self._taken = 0  # and those that the optimizer took
        self._trainer = trainer
        self._stepped_at = -1  # trainer.global_step
        self._handle: Any = None
        self.follow(optimizer)

    def follow(self, optimizer: Any) -> None:
        """Count the steps of this optimizer from now on."""
        self.close()
        self._optimizer = optimizer
        register = getattr(optimizer, "register_step_post_hook", None)
        self._handle = None if register is None else register(self._count)

    @property
    def params(self) -> list[Tensor]:
        """The optimizer's parameters that have a gradient now."""
        every = (p for group in self._optimizer.param_groups for p in group["params"])
        return [p for p in every if p.grad is not None]

    def norm(self) -> Tensor | None:
        """Return the norm of that gradient."""
        params = self.params
        return gradient_norm(params) if params else None

    def add(self, call: StepCall) -> None:
        """Add a batch, or put it in its own place: a closure may run repeatedly."""
        if self.calls and self.calls[-1].turn == call.turn:
            self.calls.pop()
        if len(self.calls) == _LONGEST:  # gradients that nobody steps with or zeroes
            self.calls.clear()
        self.calls.append(call)

    def take(self) -> list[StepCall]:
        """Return the calls, and begin another window."""
        calls, self.calls = self.calls, []
        return calls

    def is_new_step(self) -> bool:
        """Tell whether this step has not been seen yet; an LBFGS evaluates its closure often."""
        if self._stepped_at == self._trainer.global_step:
            return False
        self._stepped_at = self._trainer.global_step
        self._announced += 1
        return True

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
            f"{type(self._optimizer).__name__} that it did not know of, so no probe came before "
            "them. Step what self.optimizers() returns, not the torch optimizer itself."
        )
        if self._announced == 0:
            raise UsageError(message)
        logger.warning(message)

    def close(self) -> None:
        """Leave the optimizer as it was."""
        if self._handle is not None:
            self._handle.remove()

    def _count(self, *_: object) -> None:
        self._taken += 1


def is_comparable(calls: Sequence[StepCall]) -> bool:
    """Tell whether these calls can be made again, and have a finite loss to compare with."""
    loss = mean_of([call.loss for call in calls])
    spoilt = any(call.is_spoilt for call in calls)
    return loss is not None and not spoilt and math.isfinite(float(loss))
