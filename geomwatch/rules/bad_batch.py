"""A batch whose data and loss both lie far outside of what the run has had so far."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, group, level
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.calm import NONE, Between, Calm, Waited
from geomwatch.rules.evidence import evidence
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule, Once, soon_over


@dataclass(kw_only=True, eq=False, repr=False)
class BadBatch(LatchedRule):
    """Warns of a batch with a tensor far above its usual size, and a loss or gradient as well.

    Before the step is taken, where the host knows its loss or the gradient's norm by then: on an
    accelerator a step later, unless they are passed as numbers. The batch is looked at only where
    one of them is above `times` the largest of the last `window`. Where no tensor of it stands out
    by `size`, other rules are left to speak.
    """

    name = "bad_batch"
    says = ("warning",)

    times: float = level(5.0, "times the largest of the last ones: worth a look", source=GUESS)
    size: float = level(10.0, "times its usual size: a tensor is a suspect", source=GUESS)
    window: int = level(50, "losses and norms that are remembered", source=GUESS)
    young: int = level(10, "first ones, without a verdict", source=GUESS)
    once: Once = group(soon_over, "when an alert is news again")

    _losses: Kept[deque[float]] = field(init=False)
    _norms: Kept[deque[float]] = field(init=False)
    _seen: Kept[int] = field(init=False, default=-1)  # the last step whose numbers were taken in

    def __post_init__(self) -> None:
        super().__post_init__()
        self._losses, self._norms = deque(maxlen=self.window), deque(maxlen=self.window)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the coming step where it is known, else the one before."""
        now, settled = step.present, step.settled
        index, before = step.index, False
        loss, norm = (now.loss, now.grad_norm) if now is not None else (None, None)
        if loss is None and norm is None and settled is not None:
            index, before = settled.step, True
            loss, norm = settled.loss, settled.grad_norm
        if index <= self._seen or (loss is None and norm is None):
            return None
        self._seen = index
        ratios = self._ratio(loss, self._losses), self._ratio(norm, self._norms)
        if max(ratios) <= self.times:
            self._latch.calm(index)
            return None
        found = step.inspect(before=before)
        if found.times < self.size or not self._latch.admit("warning", index):
            return None
        which, ratio = ("loss", ratios[0]) if ratios[0] > self.times else ("gradient", ratios[1])
        do = "Look at it" if before else "Skip this step, or clip, and look at it"
        text = (
            f"the batch of step {index} is not like the others.{evidence(found, self.size)} Its "
            f"{which} is {ratio:.2g} x the largest of the last {self.window}. {do}: other alerts "
            "of these steps may come of it."
        )
        return alert(self.name, "warning", text, value=found.times, limit=self.size, step=index)

    def lets_wait(self) -> Calm | None:
        """Let what is no outlier wait, whatever is forgotten by then."""
        losses, norms = self._usual(self._losses), self._usual(self._norms)
        return None if losses is None else Calm(losses, norms or NONE)

    def waited(self, steps: Waited) -> None:
        """Take in what is no outlier."""
        for settled, now in steps:
            is_known = now.loss is not None or now.grad_norm is not None
            index, of = (settled.step + 1, now) if is_known else (settled.step, settled)
            if index > self._seen:
                self._ratio(of.loss, self._losses)
                self._ratio(of.grad_norm, self._norms)
                self._seen = index
        self._latch.calm(self._seen)

    def _usual(self, history: deque[float]) -> Between | None:
        kept = list(history)[Calm.most :]
        if len(kept) < self.young:
            return None
        return -self.times * max(kept), self.times * max(kept)

    def _ratio(self, value: float | None, history: deque[float]) -> float:
        """Return how far a value exceeds those before, and take it in, an outlier as less."""
        if value is None or not math.isfinite(value):
            return 0.0
        most = max(history, default=0.0) if len(history) >= self.young else 0.0
        history.append(min(abs(value), math.sqrt(self.times) * most) if most > 0 else abs(value))
        return abs(value) / most if most > 0 else 0.0
