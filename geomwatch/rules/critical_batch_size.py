"""A batch far above or below the gradient noise scale."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from geomwatch.estimators.noise import NO_SIGNAL
from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, above, group, level, whole
from geomwatch.observation.step import Observation
from geomwatch.records import Alert
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule, Once, soon_over


@dataclass(kw_only=True, eq=False, repr=False)
class CriticalBatchSize(LatchedRule):
    """Tells when the batch is far above or below the gradient noise scale.

    The noise scale B = tr(Sigma) / ||G||^2 is the batch at which noise equals signal: far below,
    twice the batch saves nearly half of the steps; far above, it saves none (McCandlish et al.
    2018). A single ratio is far too noisy, so that the rule averages signal and noise before
    dividing: with s the share of signal in ||g||^2, 1 / (1 + B / N) for a batch of N items (0 where
    the noise hides it), B = N (1 / mean(s) - 1) over the last `most` measurements.
    """

    name = "critical_batch_size"
    reads = ("gradient_noise_scale",)
    says = ("info",)

    far: float = level(
        10.0,
        "times above or below",
        source="McCandlish et al. 2018",
        check=above(1),
    )
    least: int = level(3, "measurements in the mean, at least", source=GUESS, check=whole(2))
    most: int = level(8, "measurements in the mean, at most", source=GUESS)
    sure: float = level(2.0, "standard errors", source=GUESS)
    once: Once = group(soon_over, "when an alert is news again")

    _shares: Kept[deque[float]] = field(init=False)
    _items: Kept[int] = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._shares = deque(maxlen=max(self.most, self.least))

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe that has measured the noise scale."""
        share = _signal(step)
        if share is None:
            return None
        if step.items != self._items:  # shares are those of one batch size
            self._items = step.items
            self._shares.clear()
        self._shares.append(share)
        if len(self._shares) < self.least:
            return None
        mean = statistics.fmean(self._shares)
        error = self.sure * statistics.stdev(self._shares) / math.sqrt(len(self._shares))
        if mean + error < 1 / (1 + self.far):
            text, limit = self._too_small(mean), self.far * self._items
        elif mean - error > 1 / (1 + 1 / self.far):
            text, limit = self._too_large(mean), self._items / self.far
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
            f"({len(self._shares)} probes; told beyond {self.far:g} x): a gradient is mostly "
            "noise. A larger batch would save steps almost in proportion; otherwise lower the "
            "learning rate, as at the end of a training anyway."
        )

    def _too_large(self, mean: float) -> str:
        scale = self._items * (1 / mean - 1)
        return (
            f"the batch of {self._items} items is far above the gradient noise scale of about "
            f"{scale:.2g} ({len(self._shares)} probes; told beyond {self.far:g} x): its items say "
            f"much the same. A batch of {max(1, round(2 * scale))} would need few more steps, each "
            "far cheaper."
        )


def _signal(step: Observation) -> float | None:
    """Return the share of ||g||^2 that is signal; 0 where the noise hides it, None if unknown."""
    found = step.measured("gradient_noise_scale")
    if found is None or step.items < 1 or step.same_data:
        return None
    if found.value is None:
        return 0.0 if found.reason.startswith(NO_SIGNAL) else None
    return 1 / (1 + found.value / step.items)
