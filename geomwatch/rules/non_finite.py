"""NaN or Inf in the loss or the gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, group, level
from geomwatch.observation.step import Observation, Settled
from geomwatch.records import Alert, Severity
from geomwatch.rules.advice import LossAdvice
from geomwatch.rules.calm import Calm, Waited
from geomwatch.rules.evidence import evidence
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule, Once, soon_over


@dataclass(kw_only=True, eq=False, repr=False)
class NonFinite(LatchedRule):
    """Says that the loss or the gradient of a step is NaN or Inf: before it is taken, if it can.

    Critical where the weights are lost, or will be by a step on such a gradient. A warning where
    the gradient of such a loss is finite: no weight is lost, as by a batch without labels. A step
    that a GradScaler leaves out because of an infinite gradient is information: it lowers its scale
    and goes on. So many in a row as `skips` are critical: no scale helps any more.
    """

    name = "non_finite"
    says = ("info", "warning", "critical")

    skips: int = level(5, "steps left out in a row: critical", source="theory: scale / 32")
    size: float = level(10.0, "times its usual size: a tensor is named", source=GUESS)
    once: Once = group(soon_over, "when an alert is news again")
    advice: LossAdvice = group(LossAdvice, "the rate to go on at")

    _skipped: Kept[int] = field(init=False, default=0)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the step before, as far as it was not known, and the coming one."""
        settled = step.settled
        told = None if settled is None else self._judge_settled(step, settled)
        return told or self._judge_coming(step)

    def lets_wait(self) -> Calm:
        """Let all that is finite wait."""
        return Calm()

    def waited(self, steps: Waited) -> None:
        """Take note of finite losses."""
        self._end(steps[-1][0].step)

    def _judge_settled(self, step: Observation, settled: Settled) -> Alert | None:
        loss, norm = settled.loss, settled.grad_norm
        if not settled.stepped:
            if norm is not None and math.isfinite(norm):
                self._end(settled.step)
                return None
            self._skipped += 1
            return self._skip(settled.step, math.inf if norm is None else norm)
        if loss is not None and not math.isfinite(loss):
            return self._judge_loss(step, settled.step, loss, norm, before=True)
        if norm is not None and not math.isfinite(norm):
            if self._is_news("critical") and step.inspect(before=True).weights_are_finite:
                message = (
                    f"the gradient norm is {norm}, but the weights are finite after the step: its "
                    "square is too large for the type it was computed in. Nothing is lost."
                )
                return self._raise("warning", settled.step, norm, message)
            message = (
                f"the gradient norm is {norm} and the optimizer has stepped with it: "
                f"the weights are lost.{self._go_back(step)}"
            )
            return self._raise("critical", settled.step, norm, message)
        if loss is not None or norm is not None:
            self._end(settled.step)
        return None

    def _judge_coming(self, step: Observation) -> Alert | None:
        now = step.present
        loss = step.loss if now is None or now.loss is None else now.loss
        norm = None if now is None else now.grad_norm
        if loss is not None and not math.isfinite(loss):
            return self._judge_loss(step, step.index, loss, norm)
        if norm is not None and not math.isfinite(norm) and self._is_news("critical"):
            found = step.inspect()
            if found.is_scaled:  # ordinary; told once it has been left out
                return None
            message = (
                f"the gradient of the batch of step {step.index} has a norm of {norm}: a step with "
                f"it destroys the weights.{evidence(found, self.size)} Skip this step, and look "
                f"at the data.{self._blame(step)}"
            )
            return self._raise("critical", step.index, norm, message)
        return None

    def _judge_loss(
        self,
        step: Observation,
        index: int,
        loss: float,
        norm: float | None,
        *,
        before: bool = False,
    ) -> Alert | None:
        is_finite = norm is not None and math.isfinite(norm)
        if not self._is_news("warning" if is_finite else "critical"):
            return None
        found = step.inspect(before=before)
        text = f"the loss of the batch of step {index} is {loss}"
        shown = evidence(found, self.size)
        is_kept = before and found.weights_are_finite
        if is_finite or is_kept:
            why = (
                f"its gradient is finite (norm {norm:.2g})"
                if is_finite
                else "the weights are finite"
            )
            text += f", but {why}: nothing is lost.{shown} Look at the labels and the data."
            return self._raise("warning", index, loss, text)
        if found.is_scaled and not before:
            text += (
                f"; a GradScaler leaves such a step out.{shown} Look at the labels and the data."
            )
            return self._raise("warning", index, loss, text)
        if before or found.weights:
            text += f": the weights are lost.{shown}{self._go_back(step)}"
        else:
            text += (
                f": a step on it destroys the weights.{shown} Skip this step, and look at the "
                f"data.{self._blame(step)}"
            )
        return self._raise("critical", index, loss, text)

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

    def _end(self, step: int) -> None:
        self._skipped = 0
        if self._latch.severity:
            self._latch.calm(step)

    def _is_news(self, severity: Severity) -> bool:
        """Tell whether an alert would be let out, before anything is spent on it."""
        if self._latch.is_news(severity):
            return True
        self._latch.between()
        return False

    def _raise(self, severity: Severity, step: int, value: float, message: str) -> Alert | None:
        if not self._latch.admit(severity, step):
            return None
        return alert(self.name, severity, message, value=value, limit=math.inf, step=step)

    def _go_back(self, step: Observation) -> str:
        """Say where to go on from, and at which rate if margins speak against the present one."""
        blamed = self._blame(step)
        start = (
            " Go back to an earlier checkpoint, or start again, without the batches before this."
        )
        return blamed or start

    def _blame(self, step: Observation) -> str:
        """Speak of the rate only where the last margins do."""
        margin = None if step.margin is None else step.margin.value
        along = None if step.gradient_margin is None else step.gradient_margin.value
        if self.advice.factor(step, margin=margin, gradient=along) == 1:
            return ""
        factor = self.advice.factor_of_loss(step, margin=margin, gradient=along)
        lower = self.advice.lower_rate(step, factor, is_lost=True)
        return f" The last margins speak against the rate as well. {lower}."
