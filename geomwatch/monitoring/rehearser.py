"""When a run is rehearsed, and over which batches."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature import batches
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.loss_scale import LossScale
from geomwatch.observation.rehearsed import Rehearsed
from geomwatch.records import Estimate

# windows, multiples -> by how much the loss rises; None where it can't be told
Ahead = Callable[[Sequence[Any], Sequence[float]], Sequence[float] | None]
Present = Callable[[Sequence[Any]], Sequence[float] | None]


@dataclass(frozen=True, kw_only=True)
class Rehearsing:
    """How far ahead, and how often, in optimizer steps."""

    steps: int = 8  # of a rehearsal, and batches that are kept
    growth: float = 2**0.5  # of the rate since the last one, from where on it is asked for
    multiple: float = 2.0  # of the rates, where it is: the next two askings
    survives: float = 0.2  # share of what was learnt that a rehearsal may lose
    memory: float = 0.01  # share of an accelerator that the batches may keep


@dataclass(frozen=True, slots=True)
class _Kept:
    """The batches of a step, by reference, and the largest rate that it had."""

    step: int
    rate: float
    window: list[Any]


class Rehearser(Resumable):
    """Keeps the last batches, by reference, and what a rise of the loss is counted in.

    A rehearsal is due when the rate has grown by `growth` since the last one and all batches are
    there. What one has shown of a step is kept for that step.
    """

    scale: Kept[LossScale]
    _rate: Kept[float]

    def __init__(self, how: Rehearsing | None = None) -> None:
        self.how = how or Rehearsing()
        self.scale = LossScale()
        self._rate = math.inf  # the largest of the last rehearsal, or of the first steps
        self._windows: deque[_Kept] = deque(maxlen=self.how.steps)
        self._losses: dict[int, float] = {}  # as the run saw them, by step
        self._known: dict[float, Rehearsed] = {}
        self._step = -1  # that is known of
        self._rates: tuple[float, ...] = ()

    def keep(self, index: int, rates: Sequence[float], window: Sequence[Any]) -> None:
        """Keep the batches of a step, with its rates."""
        if index != self._step:
            self._step, self._known = index, {}
        self._rates = tuple(rates)
        if not window:
            return
        if self._windows and self._windows[-1].step == index:  # the same step once more
            self._windows.pop()
        self._windows.append(_Kept(index, max(rates, default=0.0), list(window)))
        if len(self._windows) == 1:
            self._fit(window)

    def learn(self, index: int, loss: float) -> None:
        """Take note of the loss that a step has had."""
        self.scale.update(loss)
        self._losses[index] = loss
        if len(self._losses) > 2 * self.how.steps:
            del self._losses[next(iter(self._losses))]

    def restart(self) -> None:
        """Begin anew, with other parameters or another optimizer."""
        self._windows.clear()
        self._losses, self._known, self._rate = {}, {}, math.inf

    def due(self) -> bool:
        """Tell whether the rate has grown so far that it is worth asking."""
        rate = max(self._rates, default=0.0)
        if rate > 0 and not self.is_ready:
            self._rate = min(self._rate, rate)
        return self.is_ready and rate >= self.how.growth * self._rate

    def headed(self, peak: Sequence[float]) -> float:
        """Return the multiple of the present rates that the run is headed for, as far as is known.

        1 where they do not rise; else `multiple`, or less where the schedule shows its `peak`.
        """
        rate, before = max(self._rates, default=0.0), self._windows[0].rate
        if not rate > before or self.is_jump:
            return 1.0
        planned = max(peak, default=0.0) / rate
        return min(self.how.multiple, planned) if planned > 1 else self.how.multiple

    @property
    def is_jump(self) -> bool:
        """Whether most of what the rate has grown by came with this step."""
        if len(self._windows) < 2:
            return False
        rate, before = max(self._rates, default=0.0), self._windows[-2].rate
        return before > 0 and rate >= self.how.growth * before

    @property
    def is_ready(self) -> bool:
        """Whether there are batches to go over, and losses to count in."""
        return len(self._windows) == self._windows.maxlen and self.scale.lowest is not None

    def ahead(self, run: Ahead, multiples: Sequence[float]) -> tuple[Rehearsed, ...]:
        """Rehearse this step at some multiples of its rates."""
        missing = [m for m in multiples if m not in self._known]
        if missing and self.is_ready:
            rises = run([kept.window for kept in self._windows], missing)
            self._rate = max(self._rates, default=0.0)
            for multiple, rise in zip(missing, rises or (), strict=False):
                self._known[multiple] = Rehearsed(multiple, self._share(rise), self.how.steps)
        return tuple(self._known[m] for m in multiples if m in self._known)

    def hindsight(self, run: Present) -> float | None:
        """Return how the losses of the last batches have changed since the run has seen them.

        The mean of the changes in its standard errors.
        """
        losses = self._losses
        seen = [(k.window, losses[k.step]) for k in self._windows if k.step in losses]
        now = run([window for window, _ in seen]) if len(seen) > 1 else None
        if now is None:
            return None
        changes = [n - then for n, (_, then) in zip(now, seen, strict=True)]
        if not all(map(math.isfinite, changes)):
            return math.inf
        mean, spread = statistics.fmean(changes), statistics.stdev(changes)
        error = spread / math.sqrt(len(changes))
        return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0

    def _share(self, rise: float) -> float:
        unit = self.scale.range
        return rise / unit if unit > 0 else math.inf if rise > 0 else 0.0

    def _fit(self, window: Sequence[Any]) -> None:
        """Keep no more batches than an accelerator has room for."""
        tensors = [t for b in window for _, t in batches.parts(b) if isinstance(t, Tensor)]
        held = [t for t in tensors if t.is_cuda]
        if held:
            size = sum(t.numel() * t.element_size() for t in held)
            total = torch.cuda.get_device_properties(held[0].device).total_memory
            most = int(self.how.memory * total / max(size, 1))
            self._windows = deque(self._windows, maxlen=max(1, min(self.how.steps, most)))


class Asked:
    """What rules may ask about the present step (see `Rehearsals`)."""

    def __init__(self, rehearser: Rehearser) -> None:
        self._rehearser = rehearser
        self._ahead: Ahead | None = None
        self._present: Present | None = None
        self._peak: Sequence[float] = ()

    def set(self, ahead: Ahead | None, present: Present | None, peak: Sequence[float]) -> None:
        """Answer for a step, or for none."""
        self._ahead, self._present, self._peak = ahead, present, peak

    def __call__(self, multiple: float | None = None) -> Rehearsed | None:
        """Go some steps ahead, if that is possible."""
        if self._ahead is None or not self._rehearser.is_ready:
            return None
        at = self._rehearser.headed(self._peak) if multiple is None else multiple
        found = self._rehearser.ahead(self._ahead, (at,))
        return found[0] if found else None

    def hindsight(self) -> float | None:
        """Look back, if that is possible."""
        return None if self._present is None else self._rehearser.hindsight(self._present)

    def headroom(self, most: float) -> Estimate:
        """Return the largest multiple of the present rates that steps ahead survive.

        By doubling and halving, and by bisection to within a factor 2^(1/4); `error` is the way to
        one that they do not survive. At most 2 log2(most) + 3 rehearsals.
        """
        rehearser = self._rehearser
        if self._ahead is None or not rehearser.is_ready:
            reason = f"needs the losses and batches of {rehearser.how.steps} steps"
            return Estimate(None, status="withheld", reason=reason)
        if self(1.0) is None:
            return Estimate(None, status="withheld", reason="the run can't be rehearsed")
        low, high = 1.0, 2.0
        while low > 1 / most and not self._survives(low):
            low, high = low / 2, low
        while high <= most and low >= 1 and self._survives(high):
            low, high = high, 2 * high
        if not self._survives(low):
            return Estimate(None, status="withheld", reason=f"1/{most:g} of the rate breaks too")
        if high > most:
            return Estimate(low, reason=f"at least: no more than {most:g} was tried")
        for _ in range(2):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._survives(middle) else (low, middle)
        return Estimate(low, high - low, "residual")

    def _survives(self, multiple: float) -> bool:
        found = self(multiple)
        return found is not None and found.rise <= self._rehearser.how.survives
