"""Looks at steps once they are taken: is the formula right, and did the loss of the batch fall?"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geomwatch.isolation.signals import traceless
from geomwatch.monitoring.budget import Account
from geomwatch.monitoring.schedule import Cadence
from geomwatch.observation.taken import Taken
from geomwatch.sinks.log import logger
from geomwatch.stability.registry import known_of, unwrap
from geomwatch.stability.verification import FirstSteps
from geomwatch.vectors.layout import Layout

Open = Callable[[Sequence[Any]], Any]  # a window -> its Objective, to be entered


class TakenSteps:
    """Compares weights and losses before a step with those after it, through the optimizer's hook.

    `coming` is called last before a step; what it keeps is dropped when the step is over. An
    optimizer without a hook is not looked at, nor is one whose formula is beyond doubt.
    """

    def __init__(
        self, optimizer: Any, layout: Layout, loss_on: Open, account: Account, *, watch: bool
    ) -> None:
        self._loss_on, self._account, self._watches = loss_on, account, watch
        self._handle: Any = None
        self.follow(optimizer, layout)

    def follow(self, optimizer: Any, layout: Layout) -> None:
        """Look at the steps of another optimizer, or of other parameters."""
        self.close()
        self._optimizer: Any = unwrap(optimizer)
        self._layout = layout
        self._first_steps = FirstSteps(self._optimizer, layout.params)
        self._pending: tuple[int, Sequence[Any], Tensor, Tensor, float] | None = None
        self._is_armed = False
        self._rises = 0  # in a row
        self.last: Taken | None = None  # of the step before, if it was looked at
        self._said = ""  # what the first steps have shown
        self.may_learn = self._first_steps.is_open
        is_of_use = self._watches and (self.may_learn or not self.has_limit)
        if is_of_use and hasattr(self._optimizer, "register_step_post_hook"):
            me = weakref.ref(self)

            def over(*_: object) -> None:
                looked = me()
                if looked is not None:
                    looked._over()

            self._handle = self._optimizer.register_step_post_hook(over)
            weakref.finalize(self, self._handle.remove)

    @property
    def is_busy(self) -> bool:
        """Whether the coming step is looked at."""
        return self._is_armed or self._pending is not None

    def learnt(self) -> str:
        """Return, once, what the first steps have shown; "" if nothing is new."""
        said, self._said = self._said, ""
        self.may_learn = self._first_steps.is_open
        if not self.may_learn and self.has_limit:
            self.close()
        return said

    @property
    def has_limit(self) -> bool:
        """Whether the optimizer's margin has a limit, so that its losses need not be looked at."""
        return known_of(self._optimizer).has_formula

    def coming(
        self,
        step: int,
        window: Sequence[Any],
        *,
        due: bool,
        scale: float = 1.0,
        grad_scale: float = 1.0,
    ) -> None:
        """Keep what the step will be compared with; `due` if its loss is to be looked at."""
        self.last, self._pending = None, None
        if self._handle is None:
            return
        self._is_armed = self._first_steps.is_open
        if self._is_armed:
            self._first_steps.before(scale, grad_scale)
        due = due or 0 < self._rises < Cadence.rises
        if due and window and not self.has_limit and not self._layout.is_cut:
            try:
                self._keep(step, window)
            except Exception as error:  # whatever a loss_fn raises; probes tell of it
                logger.debug("a look at a step failed with %s: %s", type(error).__name__, error)

    @traceless
    def _keep(self, step: int, window: Sequence[Any]) -> None:
        """Take copies of the weights and the gradient, until the step is over."""
        self._account.work += self._account.units.sentinel
        with self._loss_on(window) as objective:
            loss = objective.value()
        if math.isfinite(loss):
            gradient = self._layout.flatten(
                torch.zeros_like(p) if p.grad is None else p.grad for p in self._layout.params
            )
            self._pending = step, list(window), self._layout.values(), gradient, loss

    def _over(self) -> None:
        """Look at what the step has done. Nothing here may stop a run."""
        if not self.is_busy:
            return
        pending, self._pending = self._pending, None
        is_armed, self._is_armed = self._is_armed, False
        self._account.enter(self._account.steps)
        try:
            if is_armed:
                self._said = self._first_steps.after() or self._said
            if pending is not None:
                self._compare(*pending)
        except Exception as error:  # whatever a loss_fn raises once more
            logger.debug("a look at a step failed with %s: %s", type(error).__name__, error)
        finally:
            self._account.leave()

    @traceless
    def _compare(
        self, step: int, window: Sequence[Any], before: Tensor, gradient: Tensor, loss: float
    ) -> None:
        update = self._layout.values() - before
        predicted = -float(gradient @ update)
        del before, update
        with self._loss_on(window) as objective:
            after = objective.value()
        self.last = Taken(step, loss, after, predicted)
        self._rises = 0 if self.last.rise <= 0 else self._rises + 1

    def close(self) -> None:
        """Take the hook off the optimizer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
