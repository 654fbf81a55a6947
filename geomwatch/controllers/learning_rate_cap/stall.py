"""Whether a loss has stopped falling, told from its values alone."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import GUESS, Documented, level, whole


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
