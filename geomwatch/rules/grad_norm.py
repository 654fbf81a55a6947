"""A gradient norm far outside of the run's own history."""

from __future__ import annotations

import math
import statistics
from collections import deque

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Latch

_WINDOW = 100  # norms
_YOUNG = 30  # norms without a verdict
_NORMAL = 1.4826  # sd of a normal over its median absolute deviation
_FLOOR = 0.1  # of the deviation of log norms: nearly equal norms make no outlier of a small change
_LEVEL = 8.0  # standard deviations
_IN_A_ROW = 5  # norms above the level: a bad batch is one
_PERCENTILE = 0.9  # of the history: where to clip


class GradNormSpike(Resumable):
    """Tells of gradient norms more than 8 robust standard deviations above the run's median.

    z = (log |g| - median) / sd over the last 100 norms, sd from the median absolute deviation, at
    least 0.1: ZClip's detector (Kumar et al. 2025) on logarithms and with a robust scale. At
    its z > 2.5, made for clipping, every healthy run is alarmed; the largest z of healthy
    mini-batch runs is about 5. One norm is information, five in a row a warning, unless each step
    sees the same data: full-batch training at the edge of stability has such spikes and survives.
    Norms in a spike do not enter the history.
    """

    name = "grad_norm_spike"

    _logs: Kept[deque[float]]
    _row: Kept[int]
    _latch: Kept[Latch]

    def __init__(self) -> None:
        self._logs = deque(maxlen=_WINDOW)
        self._row = 0
        self._latch = Latch()

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the norm of the step before."""
        settled = step.settled
        if settled is None or not 0 < settled.grad_norm < math.inf:
            return None
        log = math.log(settled.grad_norm)
        z = self._deviations(log)
        self._row = self._row + 1 if z > _LEVEL else 0
        if self._row == 0 or self._row > _WINDOW:  # after so long it is the new usual
            self._logs.append(log)
        if z <= _LEVEL:
            self._latch.calm(settled.step) if z < _LEVEL / 2 else self._latch.between()
            return None
        lasting = self._row >= _IN_A_ROW and not step.same_data
        severity: Severity = "warning" if lasting else "info"
        if not self._latch.admit(severity, settled.step):
            return None
        return self._alert(severity, settled.grad_norm, z, settled.step)

    def _deviations(self, log: float) -> float:
        if len(self._logs) < _YOUNG:
            return 0.0
        middle = statistics.median(self._logs)
        most = (log - middle) / _FLOOR
        if most < _LEVEL / 2:  # calm, whatever the spread, which takes three times as long
            return most
        spread = _NORMAL * statistics.median(abs(x - middle) for x in self._logs)
        return (log - middle) / max(spread, _FLOOR)

    def _alert(self, severity: Severity, norm: float, z: float, step: int) -> Alert:
        usual = math.exp(statistics.median(self._logs))
        clip = math.exp(sorted(self._logs)[int(_PERCENTILE * (len(self._logs) - 1))])
        if severity == "warning":
            what = (
                f"{self._row} gradient norms in a row lie far outside of the usual, now {norm:.3g}"
            )
            do = f"Lower the learning rate, or clip at about {clip:.2g}."
        else:
            what = f"the gradient norm is {norm:.3g}"
            do = (
                f"A single one is mostly a bad batch: look at it, or clip at about {clip:.2g} so "
                "that none can do harm."
            )
        text = (
            f"{what}, {norm / usual:.2g} x the median of the last {len(self._logs)} ({usual:.3g}), "
            f"z = {z:.1f} on their logarithms (alert above {_LEVEL:g}). {do}"
        )
        limit = usual * (norm / usual) ** (_LEVEL / z)
        return alert(self.name, severity, text, value=norm, limit=limit, step=step)
