"""What the history of a run says: that its loss has stopped falling, that its rate is too high."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from geomwatch.controllers.actuators import LR
from geomwatch.controllers.protocol import Move
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import GUESS, Documented, between, level, whole
from geomwatch.records import Alert


@dataclass(frozen=True, kw_only=True, repr=False)
class StallTest(Documented):
    """When `LearningRateCap` takes the loss for one that has stopped falling."""

    over: float = level(0.5, "share of the limit that a margin to blame is above", source=GUESS)
    bin: int = level(5, "steps in a bin of losses, until bins are merged", source="decision 016")
    bins: int = level(
        30,
        "bins before the first look, after 150 steps; at twice as many pairs are merged",
        source="decision 016",
        check=whole(6),
    )
    falling: float = level(2.0, "standard errors that count as falling", source="decision 016")


class Stall(Resumable):
    """Compares the mean loss of the last third of the steps so far with that of the third before.

    It has stopped falling unless the difference is more than twice its standard error, taken from
    means of bins, since losses in a row are alike. First asked after 150 steps, then each time half
    as many have been added: a loss that falls slowly shows it in the end, as thirds grow with the
    run. Pairs of bins are merged, so that memory stays small.
    """

    _bins: Kept[list[float]]
    _size: Kept[int]
    _open: Kept[list[float]]  # losses of the bin that is being filled

    def __init__(self, test: StallTest) -> None:
        self._test = test
        self.restart()

    def restart(self) -> None:
        """Forget all losses: what comes is trained otherwise."""
        self._bins, self._open, self._size = [], [], self._test.bin

    def __call__(self, loss: float) -> bool:
        """Take in the loss of a step; tell, where it is time to, whether it has stopped falling."""
        if not math.isfinite(loss):
            return False
        self._open.append(loss)
        if len(self._open) < self._size:
            return False
        self._bins.append(statistics.fmean(self._open))
        self._open = []
        number, first = len(self._bins), self._test.bins
        stalled = number >= first and number % (first // 2) == 0 and not self._falls()
        if number == 2 * first:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [statistics.fmean(pair) for pair in pairs]
            self._size *= 2
        return stalled

    def _falls(self) -> bool:
        third = len(self._bins) // 3
        before, last = self._bins[-2 * third : -third], self._bins[-third:]
        variance = (statistics.variance(before) + statistics.variance(last)) / third
        fallen = statistics.fmean(before) - statistics.fmean(last)
        return fallen > self._test.falling * math.sqrt(variance)


class Setback(Resumable):
    """Says when the loss forbids to raise the rate, whatever is measured meanwhile.

    After a critical alert until the loss is back at the lowest that it had been: a net that a step
    has killed has little curvature. And at a look, where it is higher than at the look before. The
    loss is smoothed, weight 0.8 on the past; where none was ever passed nothing is forbidden.
    """

    _mean: Kept[float]  # EMA without correction for its start
    _weight: Kept[float]
    _lowest: Kept[float]
    _awaited: Kept[float | None]  # the loss to come back to
    _at_look: Kept[float]  # the lowest at a look

    def __init__(self, smoothing: float) -> None:
        self._smoothing = smoothing
        self._mean = self._weight = 0.0
        self._lowest = self._at_look = math.inf
        self._awaited = None

    @property
    def lasts(self) -> bool:
        """Whether the loss has not come back yet."""
        return self._awaited is not None

    def __call__(self, loss: float | None, alerts: Sequence[Alert]) -> bool:
        """Take in the loss and the alerts of a step; tell whether the loss has just blown up."""
        critical = {alert.rule for alert in alerts if alert.severity == "critical"}
        if critical and self._awaited is None and self._lowest < math.inf:
            self._awaited = self._lowest
        if loss is not None and math.isfinite(loss):
            past = self._smoothing
            self._mean = past * self._mean + (1 - past) * loss
            self._weight = past * self._weight + 1 - past
            if self._awaited is not None and not critical and self._level() <= self._awaited:
                self._awaited = None
            self._lowest = min(self._lowest, self._level())
        return "loss_rise" in critical

    def allows_more(self) -> bool:
        """Tell, at a look, whether the rate may be raised."""
        if not self._weight:
            return True
        is_lower = self._level() < self._at_look
        self._at_look = min(self._at_look, self._level())
        return is_lower and not self.lasts

    def _level(self) -> float:
        return self._mean / self._weight


@dataclass(frozen=True, kw_only=True, repr=False)
class BaseRateTest(Documented):
    """When `LearningRateCap` says that the user's own rate is too high."""

    window: int = level(100, "last measurements that count", source=GUESS)
    enough: int = level(30, "measurements before anything is said", source=GUESS)
    share: float = level(0.3, "share that lower the rate", source=GUESS, check=between(0, 1))


class BaseRate(Resumable):
    """Advises once, by how much to lower a base rate that many measurements find too high.

    The factor is the geometric mean of those by which measurements have lowered it.
    """

    _recent: Kept[deque[float]]  # scales at measurements
    _advised: Kept[bool]

    def __init__(self, test: BaseRateTest) -> None:
        self._test = test
        self._recent = deque(maxlen=test.window)
        self._advised = False

    def __call__(self, scale: float, largest: float) -> Sequence[Move]:
        """Take in by what factor a measurement scales the user's `largest` rate."""
        self._recent.append(min(1.0, scale))
        lowered = [scale for scale in self._recent if scale < 1]
        is_often = len(lowered) > self._test.share * len(self._recent)
        if self._advised or len(self._recent) < self._test.enough or not is_often:
            return ()
        self._advised = True
        k = math.exp(-math.fsum(map(math.log, lowered)) / len(lowered))
        reason = (
            f"your base rate is about {k:.2g} x too high: {len(lowered)} of the last "
            f"{len(self._recent)} measurements have lowered it"
        )
        return (Move(LR, largest / k, reason, advice=True),)
