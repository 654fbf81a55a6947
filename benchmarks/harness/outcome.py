"""What became of a run: fixed before any detector was looked at, and by losses alone.

Losses are counted in shares of what can be learnt, (loss - floor) / (chance - floor): 0 is the
final training loss at the tuned rate, 1 a net that has learnt nothing (`tasks.rates`). Then:

- Event: the first step from 10 on at which the loss, averaged over at least 32 items, exceeds both
  3 x its running minimum (of an average with factor 0.8) and 0.87. With a floor near 0 and ten
  classes these are 3 x the lowest loss and 2.0 nats. The event is dated at the first loss above
  that limit within the average, so that batches of four make no lead longer. A loss that is not
  finite is an event whenever it comes.
- Failed: an event, and more than 1/3 left at the end (mean of the last 20 steps, 320 items at
  least). With a rate too large from step 0 no event is asked for: there may be no time before it.
- Healthy: no event, and less than 1/5 left at the end.
- Excluded: the rest, such as a spike that heals, or a rate too small to get anywhere. So is a run
  that fails at no more than its tuned rate: with a hundred steps and noisy losses a ramp to half of
  it looks like one that has gone wrong (added when two such runs of MiniLM had been seen).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tasks.rates import FAILED, Rates

HEALTHY = 1 / 5
DIVERGED = 0.9  # of what can be learnt is left: no better than chance
_RISE, _LOST = 3.0, 0.87
_FIRST = 10
_ITEMS = 32
_SMOOTHING = 0.8

Label = Literal["healthy", "failed", "excluded"]


@dataclass(frozen=True)
class Outcome:
    """How a run has ended; `event` is None where there was none, `left` may be infinite."""

    label: Label
    event: int | None
    left: float


def judge(
    losses: Sequence[float],
    rates: Rates,
    *,
    items: int,
    left: float,
    from_start: bool,
    multiple: float = math.inf,
) -> Outcome:
    """Label a run; `items` is its batch size, `left` the share left to learn at its end.

    `multiple` is its largest rate in units of the tuned one. Where a rate is too large
    `from_start`, a failed run without an event gets step 10 as its event: by then it has to be
    announced.
    """
    found = event(losses, rates, items=items)
    if (found is not None or from_start) and not left < FAILED and multiple > 1 + 1e-9:
        return Outcome("failed", _FIRST if found is None else found, left)
    if found is None and left < HEALTHY:
        return Outcome("healthy", None, left)
    return Outcome("excluded", found, left)


def event(losses: Sequence[float], rates: Rates, *, items: int) -> int | None:
    """Return the step at which the loss has blown up, if it has."""
    shares = [rates.lost(loss) for loss in losses]
    window = math.ceil(_ITEMS / items)
    smooth, lowest = 0.0, math.inf
    for step, share in enumerate(shares):
        if not math.isfinite(share):
            return step
        limit = max(_RISE * lowest, _LOST)
        recent = shares[max(0, step - window + 1) : step + 1]
        if step >= _FIRST and math.fsum(recent) / len(recent) > limit:
            return next(s for s in range(step - len(recent) + 1, step + 1) if shares[s] > limit)
        smooth = _SMOOTHING * smooth + (1 - _SMOOTHING) * share
        lowest = min(lowest, smooth / (1 - _SMOOTHING ** (step + 1)))
    return None
