"""Clips gradients at a norm that this run's own history calls unusual."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from geomwatch.controllers.actuators import CLIP
from geomwatch.controllers.protocol import Knobs, Move
from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import (
    GUESS,
    Documented,
    at_least,
    between,
    level,
    option,
    whole,
)
from geomwatch.observation.step import Observation
from geomwatch.records import Alert

RAISED_BY = ("flat_but_rough", "grad_norm_spike")


class Percentile(Resumable):
    """A percentile of the last norms, interpolated (AutoClip, Seetharaman et al. 2020, uses all).

    Args:
        share: the percentile, over 100.
        history: how many norms count.
        enough: how many it takes.
    """

    _norms: Kept[deque[float]]

    def __init__(self, share: float, history: int, enough: int) -> None:
        self._share, self._enough = share, enough
        self._norms = deque(maxlen=history)

    def update(self, norm: float) -> None:
        """Take in a norm."""
        self._norms.append(norm)

    def threshold(self) -> float:
        """Return the percentile."""
        if len(self._norms) < self._enough:
            return math.inf
        return float(np.quantile(np.fromiter(self._norms, float), self._share))


class ZScore(Resumable):
    """Mean + z standard deviations of the norms, both exponential averages (ZClip, Kumar 2025).

    ZClip (arXiv 2504.02507) goes further down the further a norm is out, to mean + z^2 / score
    standard deviations; a host clips at one norm. Norms count as clipped, as they do there.

    Args:
        z: the standard deviations.
        decay: weight of the past in the averages.
        enough: norms whose mean and variance are the first averages.
    """

    _first: Kept[list[float]]
    _mean: Kept[float]
    _variance: Kept[float]

    def __init__(self, z: float, decay: float, enough: int) -> None:
        self._z, self._decay, self._enough = z, decay, enough
        self._first = []
        self._mean = self._variance = 0.0

    def update(self, norm: float) -> None:
        """Take in a norm."""
        if len(self._first) < self._enough:
            self._first.append(norm)
            if len(self._first) == self._enough:
                self._mean = statistics.fmean(self._first)
                self._variance = statistics.pvariance(self._first)
            return
        norm = min(norm, self.threshold())
        self._mean = self._decay * self._mean + (1 - self._decay) * norm
        off = (norm - self._mean) ** 2
        self._variance = self._decay * self._variance + (1 - self._decay) * off

    def threshold(self) -> float:
        """Return the norm at the limiting score."""
        if len(self._first) < self._enough:
            return math.inf
        return self._mean + self._z * math.sqrt(self._variance)


def _known_policy(name: str, value: object) -> None:
    if value not in ("percentile", "zscore"):
        raise UsageError(f'{name} must be "percentile" or "zscore", got {value!r}.')


@dataclass(kw_only=True, eq=False, repr=False)
class GradientClipper(Documented, Resumable):
    """Clips through the loop's own clipping while gradients, or the loss around, are rough.

    An alert of one of `rules` sets the norm to clip at, by `policy` from the norms of the steps
    before; after `cooldown` steps without another one the loop's own clipping is back. A loop that
    clips already is never made to clip less.

    Clipping bounds what one bad batch does. It does not cure a rate that is too large: of a net
    with BatchNorm or under Adam, whose steps hardly depend on the norm, least of all.

    Raises:
        UsageError: a number outside its range, or an unknown policy.
    """

    knob: ClassVar[str] = CLIP

    policy: str = option(
        "percentile", '"percentile" (AutoClip) or "zscore" (ZClip)', check=_known_policy
    )
    percentile: float = level(90.0, "of the norms, to clip at", source=GUESS, check=between(0, 100))
    z: float = level(2.5, "standard deviations above the mean, to clip at", source="ZClip")
    rules: Sequence[str] | None = option(RAISED_BY, "alerts that start it; None clips always")
    history: int = level(1000, "norms that the percentile is of", source="AutoClip takes all")
    decay: float = level(
        0.97, "weight of the past in the z-score's averages", source="ZClip", check=between(0, 1)
    )
    enough: int = level(
        25,
        "norms before one can be called unusual; so many clipped in a row are told",
        source="ZClip's warm-up",
    )
    change: float = level(1.1, "factor between two norms that is worth a move", source=GUESS)
    min_norm: float = option(0.0, "smallest norm to clip at", check=at_least(0))
    patience: int = level(
        0, "further alerts within `cooldown` that it takes to start", source=GUESS, check=whole(0)
    )
    cooldown: int = level(100, "steps without an alert until it ends", source=GUESS)
    dry_run: bool = option(False, "log what would be done, and do nothing")

    _policy: Kept[Percentile | ZScore] = field(init=False)
    _raised: Kept[list[int]] = field(init=False, default_factory=list)  # steps of recent alerts
    _norm: Kept[float] = field(init=False, default=math.inf)  # that is clipped at
    _clipped: Kept[list[float]] = field(init=False, default_factory=list)  # norms in a row
    _told: Kept[bool] = field(init=False, default=False)  # of so many

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rules, str):
            self.rules = (self.rules,)
        if self.policy == "percentile":
            self._policy = Percentile(self.percentile / 100, self.history, self.enough)
        else:
            self._policy = ZScore(self.z, self.decay, self.enough)

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Take in the norm of the step before, and this step's alerts."""
        self._remember(step)
        return [*self._decide(step, alerts), *self._tell_of_a_level_below_all()]

    def _decide(self, step: Observation, alerts: Sequence[Alert]) -> Sequence[Move]:
        if self.rules is None:
            return self._follow("of the norms so far")
        raised = [a.rule for a in alerts if a.rule in self.rules and a.severity != "info"]
        self._raised = [t for t in self._raised if step.index - t < self.cooldown]
        self._raised += [step.index] * len(raised)
        if raised and len(self._raised) > self.patience:
            return self._follow(f"of the norms so far, after the alert {raised[0]}")
        if not self._raised and self._norm < math.inf:
            self._norm = math.inf
            quiet = f"no such alert for {self.cooldown} steps"
            return [Move(CLIP, math.inf, quiet)]
        return ()

    def _remember(self, step: Observation) -> None:
        settled = step.settled
        norm = None if settled is None or not settled.stepped else settled.grad_norm
        if norm is not None and math.isfinite(norm):
            self._policy.update(norm)
            is_clipped = norm > self._norm and not self._told
            self._clipped = [*self._clipped, norm] if is_clipped else []

    def _tell_of_a_level_below_all(self) -> Sequence[Move]:
        """Advise where every step is clipped: the level is then what sets the length of steps."""
        if self._told or len(self._clipped) < self.enough:
            return ()
        usual, self._clipped, self._told = statistics.median(self._clipped), [], True
        reason = (
            f"each of the last {self.enough} gradients was clipped, which lowers the rate of every "
            f"step: half of them are above {usual:.3g}. Clip there, or lower the rate instead"
        )
        return [Move(CLIP, usual, reason, advice=True)]

    def _follow(self, why: str) -> Sequence[Move]:
        norm = max(self._policy.threshold(), self.min_norm)
        if not 0 < norm < math.inf or 1 / self.change < norm / self._norm < self.change:
            return ()
        self._norm = norm
        by = (
            f"the {self.percentile:g}th percentile"
            if self.policy == "percentile"
            else f"{self.z:g} sd"
        )
        return [Move(CLIP, norm, f"{by} {why}")]
