"""NaN or Inf in the loss or the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import group, level
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import LossAdvice
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule, Once, soon_over


@dataclass(kw_only=True, eq=False, repr=False)
class NonFinite(LatchedRule):
    """Critical when the loss, or a gradient that is stepped with, is NaN or Inf.

    A step that a GradScaler leaves out because of an infinite gradient is information: it lowers
    its scale and goes on. So many in a row as `skips` are critical: no scale helps any more.
    """

    name = "non_finite"
    says = ("info", "critical")

    skips: int = level(5, "steps left out in a row: critical", source="theory: scale / 32")
    once: Once = group(soon_over, "when an alert is news again")
    advice: LossAdvice = group(LossAdvice, "the rate to go on at")

    _skipped: Kept[int] = field(init=False, default=0)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the probe of this step and the scalars of the step before."""
        settled = step.settled
        if step.loss is not None and not math.isfinite(step.loss):
            return self._raise_loss(step, step.index, step.loss)
        if settled is None:
            return None
        if settled.loss is not None and not math.isfinite(settled.loss):
            return self._raise_loss(step, settled.step, settled.loss)
        norm = math.inf if settled.grad_norm is None else settled.grad_norm
        if settled.grad_norm is None and settled.stepped:  # nobody has asked for it
            return None
        if math.isfinite(norm):
            self._skipped = 0
            self._latch.calm(settled.step)
            return None
        if settled.stepped:
            message = (
                f"the gradient norm is {norm} and the optimizer has stepped with it: "
                f"the weights are lost. {self._go_back(step)}"
            )
            return self._raise("critical", settled.step, norm, message)
        self._skipped += 1
        return self._skip(settled.step, norm)

    def _raise_loss(self, step: Observation, index: int, loss: float) -> Alert | None:
        message = (
            f"the loss is {loss}. A step taken on it destroys the weights, and training will not "
            f"recover by itself. {self._go_back(step)}"
        )
        return self._raise("critical", index, loss, message)

    def _skip(self, step: int, grad_norm: float) -> Alert | None:
        if self._skipped < self.skips:
            message = (
                f"the gradient norm is {grad_norm}; the step was left out, as a GradScaler does "
                "while it looks for its scale. No action needed."
            )
            return self._raise("info", step, grad_norm, message)
        message = (
            f"{self._skipped} steps in a row were left out because of a gradient norm of "
            f"{grad_norm}: the weights do not move any more. Go back to the last checkpoint, lower "
            "the learning rate, or train in bfloat16."
        )
        return self._raise("critical", step, grad_norm, message)

    def _raise(self, severity: Severity, step: int, value: float, message: str) -> Alert | None:
        if not self._latch.admit(severity, step):
            return None
        return alert(self.name, severity, message, value=value, limit=math.inf, step=step)

    def _go_back(self, step: Observation) -> str:
        """Say where to go on from, and at which rate: by the margins as they were last known."""
        margin = None if step.margin is None else step.margin.value
        along = None if step.gradient_margin is None else step.gradient_margin.value
        factor = self.advice.factor_of_loss(step, margin=margin, gradient=along)
        lower = self.advice.lower_rate(step, factor, is_lost=True)
        return f"{lower}, or look for bad data in the last batches."
