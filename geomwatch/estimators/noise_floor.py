"""How exactly a loss can be read, and whether it is a function of the weights at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from geomwatch.vectors.layout import Layout

LossAt: TypeAlias = Callable[[Tensor], float]  # (D,) displacement d -> L(w + d)

NO_FUNCTION = "the loss is no function of the weights"
_ROUNDINGS = 8  # kernels that add up in any order differ by a few of them
_JITTERED, _DIGITS = 5, 4


@dataclass(frozen=True, slots=True)
class Readout:
    """A loss, and the difference of two losses below which rounding decides. In units of loss.

    `reason` says why differences of losses have no meaning at all; "" where they have one.
    """

    loss: float  # L(w)
    floor: float
    reason: str = ""


def read_out(loss_at: LossAt, layout: Layout, *, rng: torch.Generator) -> Readout:
    """Evaluate the loss twice at w, to see whether it is the same, and close by, for its noise.

    The floor is |L| eps, or two standard deviations of the loss with every weight moved by its
    last digits (+-4 eps of itself) where that is more: a small loss carries the rounding of large
    logits, 3 to 15 times |L| eps in trained MLPs. eps is that of the coarsest parameter, 2^-23 for
    float32. Losses at w itself that differ by more than a few roundings come from a loss that draws
    random numbers no probe can replay, or reads other data each time. Seven forward passes.
    """
    origin = layout.zeros()
    loss, again = loss_at(origin), loss_at(origin)
    eps = max(torch.finfo(p.dtype).eps for p in layout.params)
    rounding, spread = abs(loss) * eps, abs(again - loss)
    if not spread <= _ROUNDINGS * rounding:
        reason = (
            f"{NO_FUNCTION}: two evaluations at the same point differ by "
            f"{spread:.2g}. Let loss_fn draw its random numbers from the global generators, which "
            "are replayed, and use the same data each time"
        )
        return Readout(loss, max(rounding, spread), reason)
    digits = _DIGITS * eps * layout.values()
    jittered = [loss_at(digits * layout.rademacher(rng)) for _ in range(_JITTERED)]
    if not all(map(math.isfinite, jittered)):
        return Readout(loss, math.inf, "the loss is not finite next to the weights")
    return Readout(loss, max(rounding, spread, 2 * statistics.stdev(jittered)))
