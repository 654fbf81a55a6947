"""A sign of life: silence means "watched and fine", so what can't be watched is said."""

from __future__ import annotations

_NO_STEP = (
    "no step of the optimizer was counted in {calls} calls of monitor.step(). If another optimizer "
    "steps, say monitor.follow(optimizer); if a GradScaler leaves out all steps, look for what is "
    "not finite; if gradients are accumulated, call step() once per optimizer step and "
    "observe(batch) for each micro-batch."
)
_NO_MARGIN = (
    "no margin could be measured in {calls} calls of monitor.step(): {reason}. "
    "geomwatch.doctor(model, loss_fn, batch, optimizer=optimizer) says what can be measured."
)
_UNKNOWN = "no look at the run could be made"


class Heartbeat:
    """Says once in each lapse that nothing could be measured for an interval, and at the end.

    Calls of `monitor.step` are counted, not steps, since it may be that none is counted.

    Args:
        interval: calls without a margin, or without a step, that are worth a word.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._blind = 0  # calls without a usable margin
        self._idle = 0  # calls without a step
        self._steps = -1
        self._known = False  # a margin was measured
        self._told = False

    def beat(self, steps: int, *, usable: bool) -> bool:
        """Take note of a call after so many steps; tell whether there is something to say now."""
        self._blind = 0 if usable else self._blind + 1
        self._idle = self._idle + 1 if steps == self._steps else 0
        self._steps = steps
        self._known |= usable
        if max(self._blind, self._idle) < self.interval:
            self._told &= not usable
            return False
        told, self._told = self._told, True
        return not told

    def ends_blind(self) -> bool:
        """Tell whether the run ends in a lapse, or has never had a margin."""
        return (self._blind > 0 and not self._known) or self._blind >= self.interval

    def words(self, reason: str) -> str:
        """Say what is wrong; `reason` is why the last look has found nothing, "" if unknown."""
        if self._idle and self._idle >= self._blind - 1:
            return _NO_STEP.format(calls=self._idle + 1)
        return _NO_MARGIN.format(calls=self._blind, reason=(reason or _UNKNOWN).rstrip("."))
