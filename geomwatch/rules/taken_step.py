"""The steps raise the loss of the very batches that they are made from."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, above, level, whole
from geomwatch.observation.step import Observation
from geomwatch.observation.taken import Taken
from geomwatch.records import Alert, Severity
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule


@dataclass(kw_only=True, eq=False, repr=False)
class TakenStep(LatchedRule):
    """Warns when steps of an optimizer without a formula raise the loss of their own batches.

    L(w + u) - L(w), u the update that was really taken and L the loss of the batch it was made
    from. A step is made to lower it; that it does not, on average and clearly, or by much at once,
    is what a margin beyond 1 would say. Momentum may raise the loss of a batch now and then, so
    that one step counts only if it raises it by more than `share` of its size.
    """

    name = "taken_step"
    reads = "taken"
    says = ("warning", "critical")

    share: float = level(0.3, "share of the loss that one step raises it by", source="decision 014")
    lost: float = level(1.0, "the same: critical", source=GUESS, check=above(0))
    errors: float = level(2.0, "standard errors that a mean rise is above zero", source=GUESS)
    least: int = level(5, "steps in that mean, at least", source=GUESS, check=whole(2))
    most: int = level(10, "steps in it, at most", source=GUESS, check=whole(2))

    _rises: Kept[deque[float]] = field(init=False)  # relative

    def __post_init__(self) -> None:
        super().__post_init__()
        self._rises = deque(maxlen=self.most)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the step before, where its loss was looked at again."""
        taken = step.taken
        if taken is None or not taken.before:
            return None
        rise = taken.rise / abs(taken.before)
        is_finite = math.isfinite(rise)
        self._rises.append(rise if is_finite else self.lost)
        mean, error = self._mean()
        is_clear = len(self._rises) >= self.least and mean > self.errors * error
        if is_finite and rise <= self.share and not is_clear:
            self._latch.calm(step.index)
            return None
        severity: Severity = "critical" if not rise <= self.lost else "warning"
        if not self._latch.admit(severity, step.index):
            return None
        return self._alert(step, severity, taken, mean)

    def _mean(self) -> tuple[float, float]:
        count = len(self._rises)
        if count < 2:
            return 0.0, math.inf
        error = statistics.stdev(self._rises) / math.sqrt(count)
        return statistics.fmean(self._rises), error

    def _alert(self, step: Observation, severity: Severity, taken: Taken, mean: float) -> Alert:
        count = len(self._rises)
        many = f", {mean:+.0%} on average over {count} steps" if count > 1 else ""
        text = (
            f"step {taken.step} of {step.optimizer} has taken the loss of its own batch from "
            f"{taken.before:.4g} to {taken.after:.4g}{many}; by its "
            f"gradient it should have fallen by {taken.predicted:.3g}. No stability limit is known "
            f"for it: lower the learning rate of {step.rate:.3g} until steps lower the loss."
        )
        rise = taken.rise / abs(taken.before)
        return alert(self.name, severity, text, value=rise, limit=self.share, step=step.index)
