"""Standard error of any function of independent pieces: leave each out in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def jackknife(left_out: Sequence[float]) -> float:
    """Return the standard error of an estimate from its values with one piece of m left out.

    sqrt((m-1)/m sum_i (t_i - mean t)^2), exactly s / sqrt(m) where the estimate is a mean
    (Quenouille 1949, Tukey 1958).
    """
    m = len(left_out)
    return (m - 1) / math.sqrt(m) * statistics.stdev(left_out)
