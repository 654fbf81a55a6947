"""Leaves out a step whose gradient is not finite, or absurd, before it is taken."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from geomwatch.controllers.actuators import SKIP
from geomwatch.controllers.protocol import Knobs, Move
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import GUESS, Documented, above, level, option
from geomwatch.observation.step import Observation
from geomwatch.records import Alert


@dataclass(kw_only=True, eq=False, repr=False)
class SkipStep(Documented, Resumable):
    """Does not apply a gradient that is not finite, or far larger than any of the last ones.

    The norm is known before the step: the monitor computes it at every step, unless the loop passes
    what `clip_grad_norm_` returned, and on an accelerator waits for it. A skipped step leaves
    weights and the optimizer's state as they are; it counts as a step of the run, for schedules
    too. At most `in_a_row` are skipped: gradients that stay so are no bad batch, and the next step
    is taken. Norms that were skipped do not enter the history.

    Not where a GradScaler does so by itself, nor where the weights are lost already, which is said
    once.

    Raises:
        UsageError: a number outside its range; where the monitor is built, an optimizer whose steps
            can't be left out.
    """

    knob: ClassVar[str] = SKIP

    times: float = level(
        10.0, "times the largest of the last norms: absurd", source=GUESS, check=above(1)
    )
    window: int = level(50, "norms that are remembered", source="as `bad_batch`")
    young: int = level(10, "first norms, none of which is absurd", source="as `bad_batch`")
    in_a_row: int = level(5, "steps that may be skipped in a row", source=GUESS)
    dry_run: bool = option(False, "log what would be done, and do nothing")

    _norms: Kept[deque[float]] = field(init=False)
    _row: Kept[int] = field(init=False, default=0)
    _judged: Kept[int] = field(init=False, default=-1)  # the last step, which may be seen twice

    def __post_init__(self) -> None:
        super().__post_init__()
        self._norms = deque(maxlen=self.window)

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Judge the gradient of the coming step."""
        norm = None if step.present is None else step.present.grad_norm
        if norm is None:
            return ()
        reason = self._wrong(norm)
        if not reason:
            if step.index > self._judged:
                self._norms.append(norm)
            self._row, self._judged = 0, step.index
            return ()
        self._judged = step.index
        found = step.inspect()
        if found.is_scaled and not math.isfinite(norm):
            return ()
        if found.weights:
            lost = f"{found.weights} is not finite: the weights are lost, whatever is skipped"
            return [Move(SKIP, 1.0, lost, advice=True)]
        if self._row >= self.in_a_row:
            self._row = 0
            if math.isfinite(norm):  # after so many it is the new usual
                self._norms.append(norm)
            why = f"{self.in_a_row} steps in a row were skipped: what comes now is taken"
            return [Move(SKIP, 1.0, f"{why} (step {step.index})", advice=True)]
        self._row += 1
        blame = found.not_finite or found.outsized
        at = f", and so is {blame} of the batch" if blame else ""
        return [Move(SKIP, 1.0, f"the gradient of the batch of step {step.index} {reason}{at}")]

    def _wrong(self, norm: float) -> str:
        """Return what is wrong with a gradient of this norm; "" for nothing."""
        if not math.isfinite(norm):
            return f"is not finite (norm {norm:g})"
        largest = max(self._norms, default=math.inf)
        if len(self._norms) < self.young or norm <= self.times * largest:
            return ""
        return f"has a norm of {norm:.3g}, {norm / largest:.3g} x the largest of the last ones"
