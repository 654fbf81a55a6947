"""A batch far above or below the gradient noise scale."""

from __future__ import annotations

import math
import statistics
from collections import deque

from geomwatch.estimators.noise import NO_SIGNAL
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Latch

_FAR = 10.0  # times above or below
_ENOUGH = 3  # measurements: one alone errs by its own size
_KEPT = 8
_SURE = 2.0  # standard errors


class CriticalBatchSize(Resumable):
    """Tells when the batch is more than 10 x above or below the gradient noise scale.

    The noise scale B = tr(Sigma) / ||G||^2 is the batch at which noise equals signal: far below,
    twice the batch saves nearly half of the steps; far above, it saves none (McCandlish et al.
    2018). A single ratio is far too noisy, so that the rule averages signal and noise before
    dividing: with s the share of signal in ||g||^2, 1 / (1 + B / N) for a batch of N items (0 where
    the noise hides it), B = N (1 / mean(s) - 1) over the last eight measurements.
    """

    name = "critical_batch_size"

    _shares: Kept[deque[float]]
    _items: Kept[int]
    _latch: Kept[Latch]

    def __init__(self) -> None:
        self._shares = deque(maxlen=_KEPT)
        self._items = 0
        self._latch = Latch(release=1, cooldown=0)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe that has measured the noise scale."""
        share = _signal(step)
        if share is None:
            return None
        if step.items != self._items:  # shares are those of one batch size
            self._items = step.items
            self._shares.clear()
        self._shares.append(share)
        if len(self._shares) < _ENOUGH:
            return None
        mean = statistics.fmean(self._shares)
        error = _SURE * statistics.stdev(self._shares) / math.sqrt(len(self._shares))
        if mean + error < 1 / (1 + _FAR):
            text, limit = self._too_small(mean), _FAR * self._items
        elif mean - error > 1 / (1 + 1 / _FAR):
            text, limit = self._too_large(mean), self._items / _FAR
        else:
            self._latch.calm(step.index)
            return None
        if not self._latch.admit("info", step.index):
            return None
        value = self._items * (1 / max(mean, 1e-6) - 1)
        return alert(self.name, "info", text, value=value, limit=limit, step=step.index)

    def _too_small(self, mean: float) -> str:
        scale = f"about {self._items * (1 / mean - 1):.2g}" if mean > 0 else "out of sight"
        return (
            f"the batch of {self._items} items is far below the gradient noise scale, {scale} "
            f"({len(self._shares)} probes; told beyond {_FAR:g} x): a gradient is mostly noise. "
            "A larger batch would save steps almost in proportion; otherwise lower the learning "
            "rate, as at the end of a training anyway."
        )

    def _too_large(self, mean: float) -> str:
        scale = self._items * (1 / mean - 1)
        return (
            f"the batch of {self._items} items is far above the gradient noise scale of about "
            f"{scale:.2g} ({len(self._shares)} probes; told beyond {_FAR:g} x): its items say much "
            f"the same. A batch of {max(1, round(2 * scale))} would need few more steps, each far "
            "cheaper."
        )


def _signal(step: Observation) -> float | None:
    """Return the share of ||g||^2 that is signal; 0 where the noise hides it, None if unknown."""
    found = (step.estimates or {}).get("gradient_noise_scale")
    if found is None or found.status == "held" or step.items < 1 or step.same_data:
        return None
    if found.value is None:
        return 0.0 if found.reason.startswith(NO_SIGNAL) else None
    return 1 / (1 + found.value / step.items)
