"""How much curvature along the steps healthy runs have, by batch and optimizer."""

from __future__ import annotations

import math

from geomwatch.observation.step import Observation

_ITEMS, _RATIO = 64, 19.0  # the batch and the noise ratio (momentum 0.9) of the levels below:
_LONG, _LONG_ADAPTIVE = 7.0, 12.0  # in units of the small-batch limit
_GROWTH = 1 / 3  # power of the batch that they grow with
_QUIET = 2.5  # times higher where batches agree
_EDGE = 1.3  # no level lies beyond so many times the limit of the full batch, or below


def gradient_level(
    step: Observation, at_64: float | None = None, *, is_quiet: bool = False
) -> float:
    """Return a level of the gradient margin for this batch and this optimizer.

    `at_64` is that of 64 items and a momentum of 0.9; by default that of a mean over 60 steps.
    Where `is_quiet`, batch noise is known to matter hardly at all (see `regime`).
    """
    edge = _EDGE * step.limit_ratio
    if step.same_data:
        return edge
    if at_64 is None:
        at_64 = _LONG_ADAPTIVE if step.adaptive else _LONG
    at_64 *= _QUIET if is_quiet else 1.0
    level = at_64 * (items_of(step) / _ITEMS) ** _GROWTH * math.sqrt(step.limit_ratio / _RATIO)
    return float(min(max(level, _EDGE), edge))


def items_of(step: Observation) -> int:
    """Return the batch last measured on."""
    return step.items or _ITEMS
