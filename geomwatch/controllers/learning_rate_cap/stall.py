"""Whether a loss has stopped falling, told from its values alone."""

from __future__ import annotations

import math
import statistics
from typing import Any

_BIN = 5  # steps in a bin, until bins are merged
_FIRST = 30  # bins before the first look
_MOST = 60  # bins kept: then pairs are merged, so that memory stays small and a look spans more
_FALLING = 2.0  # standard errors


class Stall:
    """Compares the mean loss of the last third of the steps so far with that of the third before.

    It has stopped falling unless the difference is more than twice its standard error, taken from
    means of bins since losses in a row are alike. First asked after 150 steps, then each time half
    as many have been added: a loss that falls slowly shows it in the end, as thirds grow with the
    run.
    """

    def __init__(self) -> None:
        self._bins: list[float] = []
        self._size = _BIN
        self._open: list[float] = []  # losses of the bin that is being filled

    def __call__(self, loss: float) -> bool:
        """Take in the loss of a step; tell, where it is time to, whether it has stopped falling."""
        if not math.isfinite(loss):
            return False
        self._open.append(loss)
        if len(self._open) < self._size:
            return False
        self._bins.append(statistics.fmean(self._open))
        self._open = []
        number = len(self._bins)
        stalled = number >= _FIRST and number % (_FIRST // 2) == 0 and not self._falls()
        if number == _MOST:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [statistics.fmean(pair) for pair in pairs]
            self._size *= 2
        return stalled

    def _falls(self) -> bool:
        third = len(self._bins) // 3
        before, last = self._bins[-2 * third : -third], self._bins[-third:]
        variance = (statistics.variance(before) + statistics.variance(last)) / third
        fallen = statistics.fmean(before) - statistics.fmean(last)
        return fallen > _FALLING * math.sqrt(variance)

    def restart(self) -> None:
        """Forget all losses: what comes is trained otherwise."""
        self._bins, self._open, self._size = [], [], _BIN

    def state_dict(self) -> dict[str, Any]:
        """Return the means of bins, and the losses of the last one."""
        return {"bins": list(self._bins), "size": self._size, "open": list(self._open)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the bins."""
        self._bins, self._open = list(state["bins"]), list(state["open"])
        self._size = state["size"]
