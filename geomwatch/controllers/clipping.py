"""Clips gradients at a norm that this run's own history calls unusual."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from geomwatch.controllers.actuators import CLIP
from geomwatch.controllers.protocol import Knobs, Move, check_above
from geomwatch.curvature.checks import check_count
from geomwatch.errors import UsageError
from geomwatch.records import Alert
from geomwatch.rules import Observation

RAISED_BY = ("flat_but_rough", "grad_norm_spike")
_HISTORY = 1000  # norms
_YOUNG = 25  # norms, before which no norm is called unusual
_MOVES = 1.1  # factor between two norms to clip at that are worth a move


class Policy(Protocol):
    """From the gradient norms of a run to the norm to clip at."""

    def update(self, norm: float) -> None:
        """Take in the norm of a step that was taken."""

    def threshold(self) -> float:
        """Return the norm to clip at; infinite while too little is known."""

    def state_dict(self) -> dict[str, Any]:
        """Return what it remembers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""


class Percentile:
    """The p-th percentile of the last 1,000 norms (AutoClip, Seetharaman et al. 2020, uses all)."""

    def __init__(self, percentile: float) -> None:
        if not isinstance(percentile, int | float) or not 0 < percentile < 100:
            raise UsageError(f"percentile must be between 0 and 100, got {percentile!r}.")
        self._share = percentile / 100
        self._norms: deque[float] = deque(maxlen=_HISTORY)

    def update(self, norm: float) -> None:
        """Take in a norm."""
        self._norms.append(norm)

    def threshold(self) -> float:
        """Return the percentile, interpolated between norms."""
        if len(self._norms) < _YOUNG:
            return math.inf
        return float(np.quantile(np.fromiter(self._norms, float), self._share))

    def state_dict(self) -> dict[str, Any]:
        """Return the norms."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._norms = deque(state["norms"], maxlen=_HISTORY)


class ZScore:
    """Mean + z standard deviations of the norms, both exponential averages (ZClip, Kumar 2025).

    ZClip (arXiv 2504.02507) goes further down the further a norm is out, to mean + z^2 / score
    standard deviations; a host clips at one norm. Norms count as clipped, as they do there.
    """

    _DECAY = 0.97

    def __init__(self, z: float) -> None:
        check_above("z", z, 0)
        self._z = z
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def update(self, norm: float) -> None:
        """Take in a norm."""
        if len(self._first) < _YOUNG:
            self._first.append(norm)
            if len(self._first) == _YOUNG:
                self._mean = statistics.fmean(self._first)
                self._variance = statistics.pvariance(self._first)
            return
        norm = min(norm, self.threshold())
        self._mean = self._DECAY * self._mean + (1 - self._DECAY) * norm
        off = (norm - self._mean) ** 2
        self._variance = self._DECAY * self._variance + (1 - self._DECAY) * off

    def threshold(self) -> float:
        """Return the norm at the limiting score."""
        if len(self._first) < _YOUNG:
            return math.inf
        return self._mean + self._z * math.sqrt(self._variance)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages."""
        return {"first": self._first, "mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._first = list(state["first"])
        self._mean, self._variance = state["mean"], state["variance"]


class GradientClipper:
    """Clips through the loop's own clipping while gradients, or the loss around, are rough.

    An alert of one of `rules` sets the norm to clip at, by `policy` from the norms of the steps
    before; after `cooldown` steps without another one the loop's own clipping is back. A loop that
    clips already is never made to clip less.

    Clipping bounds what one bad batch does. It does not cure a rate that is too large: of a net
    with BatchNorm or under Adam, whose steps hardly depend on the norm, least of all.

    Args:
        policy: "percentile" (AutoClip) or "zscore" (ZClip).
        percentile: of the norms, to clip at.
        z: standard deviations above the mean, to clip at.
        rules: the alerts that start it; None for always, after the first 25 steps.
        min_norm: never clip at less.
        patience: further alerts, within `cooldown` steps, that it takes to start.
        cooldown: optimizer steps without an alert until it ends.

    Raises:
        UsageError: a number outside its range, or an unknown policy.
    """

    knob = CLIP

    def __init__(
        self,
        *,
        policy: str = "percentile",
        percentile: float = 90.0,
        z: float = 2.5,
        rules: Sequence[str] | None = RAISED_BY,
        min_norm: float = 0.0,
        patience: int = 0,
        cooldown: int = 100,
    ) -> None:
        policies: dict[str, Policy] = {"percentile": Percentile(percentile), "zscore": ZScore(z)}
        if policy not in policies:
            raise UsageError(f'policy must be "percentile" or "zscore", got {policy!r}.')
        check_above("min_norm", min_norm, 0, inclusive=True)
        check_count("patience", patience, 0)
        check_count("cooldown", cooldown, 1)
        self._policy = policies[policy]
        self._named = f"the {percentile:g}th percentile" if policy == "percentile" else f"{z:g} sd"
        self._rules = None if rules is None else tuple(rules)
        self._min_norm, self._patience, self._cooldown = min_norm, patience, cooldown
        self._raised: list[int] = []  # steps of the recent alerts
        self._norm = math.inf  # that is clipped at

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Take in the norm of the step before, and this step's alerts."""
        self._remember(step)
        if self._rules is None:
            return self._follow("of the norms so far")
        raised = [a.rule for a in alerts if a.rule in self._rules and a.severity != "info"]
        self._raised = [t for t in self._raised if step.index - t < self._cooldown]
        self._raised += [step.index] * len(raised)
        if raised and len(self._raised) > self._patience:
            return self._follow(f"of the norms so far, after the alert {raised[0]}")
        if not self._raised and self._norm < math.inf:
            self._norm = math.inf
            quiet = f"no such alert for {self._cooldown} steps"
            return [Move(CLIP, math.inf, quiet)]
        return ()

    def _remember(self, step: Observation) -> None:
        settled = step.settled
        if settled is not None and settled.stepped and math.isfinite(settled.grad_norm):
            self._policy.update(settled.grad_norm)

    def _follow(self, why: str) -> Sequence[Move]:
        norm = max(self._policy.threshold(), self._min_norm)
        if not 0 < norm < math.inf or 1 / _MOVES < norm / self._norm < _MOVES:
            return ()
        self._norm = norm
        return [Move(CLIP, norm, f"{self._named} {why}")]

    def state_dict(self) -> dict[str, Any]:
        """Return the norms, the alerts and the norm that is clipped at."""
        return {
            "policy": self._policy.state_dict(),
            "raised": list(self._raised),
            "norm": self._norm if math.isfinite(self._norm) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        self._policy.load_state_dict(state["policy"])
        self._raised = list(state["raised"])
        self._norm = math.inf if state["norm"] is None else state["norm"]
