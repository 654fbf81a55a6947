"""A gradient norm far outside of the run's own history."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, between, level
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.calm import NONE, Calm, Waited
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule

_NORMAL = 1.4826  # sd of a normal over its median absolute deviation


@dataclass(kw_only=True, eq=False, repr=False)
class GradNormSpike(LatchedRule):
    """Tells of gradient norms far above the run's median, by robust standard deviations.

    z = (log |g| - median) / sd over the last `window` norms, sd from the median absolute deviation,
    at least `floor`: ZClip's detector (Kumar et al. 2025) on logarithms and with a robust scale.
    At its z > 2.5, made for clipping, every healthy run is alarmed. One norm is information,
    `in_a_row` a warning, unless each step sees the same data: full-batch training at the edge of
    stability has such spikes and survives. Norms in a spike do not enter the history.
    """

    name = "grad_norm_spike"
    reads = "norm"
    says = ("info", "warning")

    z: float = level(8.0, "robust standard deviations", source="112 healthy runs: 5.1 in 95 %")
    in_a_row: int = level(5, "norms above `z` that warn: a bad batch is one", source=GUESS)
    calm: float = level(
        0.5, "share of `z`, below which it is over", source=GUESS, check=between(0, 1)
    )
    window: int = level(100, "norms in the history", source=GUESS)
    young: int = level(30, "first norms, without a verdict", source=GUESS)
    floor: float = level(0.1, "standard deviation of log norms, at least", source=GUESS)
    percentile: float = level(
        0.9,
        "quantile of norms to clip at",
        source="AutoClip",
        check=between(0, 1),
    )

    _logs: Kept[deque[float]] = field(init=False)
    _row: Kept[int] = field(init=False, default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._logs = deque(maxlen=self.window)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge the norm of the step before."""
        settled = step.settled
        norm = None if settled is None else settled.grad_norm
        if settled is None or norm is None or not 0 < norm < math.inf:
            return None
        log = math.log(norm)
        z = self._deviations(log)
        self._row = self._row + 1 if z > self.z else 0
        if self._row == 0 or self._row > self.window:  # after so long it is the new usual
            self._logs.append(log)
        if z <= self.z:
            if self._latch.severity:
                self._latch.calm(settled.step) if z < self.calm * self.z else self._latch.between()
            return None
        lasting = self._row >= self.in_a_row and not step.same_data
        severity: Severity = "warning" if lasting else "info"
        if not self._latch.admit(severity, settled.step):
            return None
        return self._alert(severity, norm, z, settled.step)

    def lets_wait(self) -> Calm:
        """Let norms wait that are no spike whatever their spread, but while there is one."""
        if self._row or self._latch.severity:
            return Calm(norms=NONE)
        if len(self._logs) < self.young - Calm.most:
            return Calm()
        if len(self._logs) < self.young:
            return Calm(norms=NONE)
        most = statistics.median(self._logs) + self.calm * self.z * self.floor
        return Calm(norms=(0.0, math.exp(most)))

    def waited(self, steps: Waited) -> None:
        """Take in norms that are no spikes."""
        norms = (settled.grad_norm for settled, _ in steps)
        self._logs.extend(math.log(norm) for norm in norms if norm is not None)

    def _deviations(self, log: float) -> float:
        if len(self._logs) < self.young:
            return 0.0
        middle = statistics.median(self._logs)
        most = (log - middle) / self.floor
        if most < self.calm * self.z:  # calm, whatever the spread, which takes three times as long
            return most
        spread = _NORMAL * statistics.median(abs(x - middle) for x in self._logs)
        return (log - middle) / max(spread, self.floor)

    def _alert(self, severity: Severity, norm: float, z: float, step: int) -> Alert:
        usual = math.exp(statistics.median(self._logs))
        clip = math.exp(sorted(self._logs)[int(self.percentile * (len(self._logs) - 1))])
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
            f"z = {z:.1f} on their logarithms (alert above {self.z:g}). {do}"
        )
        limit = usual * (norm / usual) ** (self.z / z)
        return alert(self.name, severity, text, value=norm, limit=limit, step=step)
