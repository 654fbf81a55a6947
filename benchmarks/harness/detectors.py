"""What a user has today, as a score for each step; and geomwatch's alerts beside it.

A score at step t uses nothing that is not known before step t is taken: its loss, its gradient and
the probes up to it. geomwatch itself hears of a loss one step later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.story import Story

Scores = np.ndarray  # (steps,), -inf where there is none yet
Alarm = Callable[[Story], int | None]  # the step before which it is raised

_WINDOW = 50
_SMOOTHING = 0.8


@dataclass(frozen=True)
class Detector:
    """A score that alarms above a threshold. `pays` for nothing, gradient norms or probes."""

    name: str
    formula: Callable[[Story], Scores]
    pays: str = "nothing"

    def score(self, story: Story) -> Scores:
        """Return the score of each step; computed once a story."""
        if self.name not in story.scores:
            story.scores[self.name] = self.formula(story)
        return story.scores[self.name]


def loss_z_score(story: Story) -> Scores:
    """Return (loss - mean) / sd over the 50 losses before."""
    return _trailing(story.losses, lambda now, past: (now - past.mean()) / (past.std() + 1e-12))


def loss_rise(story: Story) -> Scores:
    """Return EMA(loss) - min EMA, in units of the first loss so that tasks compare."""
    smooth = _smooth(story.losses)
    lowest = np.minimum.accumulate(smooth)
    return _masked((smooth - lowest) / abs(smooth[0]), 5)


def loss_ratio(story: Story) -> Scores:
    """Return EMA(loss) / min EMA."""
    smooth = _smooth(story.losses)
    return _masked(smooth / np.minimum.accumulate(smooth), 5)


def grad_norm_z_score(story: Story) -> Scores:
    """Return ZClip's score: z under exponential moments that a spike enters clipped only.

    Kumar et al. 2025, arXiv 2504.02507: factor 0.97, 25 steps to start, clipped above z = 2.5.
    """
    keep, limit, start = 0.97, 2.5, 25
    norms = story.grad_norms
    scores = np.full(len(norms), -math.inf)
    if len(norms) <= start:
        return scores
    mean, variance = float(np.mean(norms[:start])), float(np.var(norms[:start]))
    for step in range(start, len(norms)):
        sd = math.sqrt(variance) + 1e-12
        z = (norms[step] - mean) / sd
        scores[step] = z if math.isfinite(z) else math.inf
        counted = mean + limit**2 / z * sd if z > limit else norms[step]
        if math.isfinite(counted):
            mean = keep * mean + (1 - keep) * counted
            variance = keep * variance + (1 - keep) * (counted - mean) ** 2
    return scores


def grad_norm_ratio(story: Story) -> Scores:
    """Return the gradient norm over the median of the 50 before."""
    return _trailing(story.grad_norms, lambda now, past: now / (np.median(past) + 1e-12))


def lambda_max(story: Story) -> Scores:
    """Return lambda_max of the Hessian where it was measured: the paper's lambda_max > tau."""
    return _at_probes(story, "lambda_max")


def margin(story: Story) -> Scores:
    """Return the stability margin where it was measured, without any rule."""
    return _at_probes(story, "stability_margin")


LOSS_AND_GRADIENT = (
    Detector("loss z-score (50 steps)", loss_z_score),
    Detector("loss above running minimum", loss_rise),
    Detector("loss / running minimum", loss_ratio),
    Detector("gradient norm z-score (ZClip)", grad_norm_z_score, "gradient norms"),
    Detector("gradient norm / median (50)", grad_norm_ratio, "gradient norms"),
)
RAW_LAMBDA = Detector("λ_max > τ (the paper)", lambda_max, "probes")
RAW_MARGIN = Detector("margin, one probe", margin, "probes")
DETECTORS = (*LOSS_AND_GRADIENT, RAW_LAMBDA, RAW_MARGIN)

_LOUD = ("warning", "critical")
_SCALAR_RULES = ("loss", "grad_norm", "non_finite")  # how the names of rules without geometry begin


def above(detector: Detector, threshold: float) -> Alarm:
    """Alarm at the first score above a threshold."""

    def alarm(story: Story) -> int | None:
        return first_above(detector.score(story), threshold)

    return alarm


def first_above(scores: Scores, threshold: float) -> int | None:
    over = np.flatnonzero(scores > threshold)
    return int(over[0]) if len(over) else None


def geomwatch(story: Story) -> int | None:
    """Hear the first alert at or above warning, of any rule."""
    return first_alert(story, severities=_LOUD)


def geomwatch_geometry(story: Story) -> int | None:
    """Hear the first alert at or above warning of the rules that look at curvature."""
    return first_alert(story, severities=_LOUD, geometry=True)


def geomwatch_unplanned(story: Story) -> int | None:
    """Hear the first such alert of a rule that knows nothing of the schedule."""
    return first_alert(story, severities=_LOUD, unplanned=True)


def either(*alarms: Alarm) -> Alarm:
    """Alarm when the first of several does."""

    def alarm(story: Story) -> int | None:
        return min((s for a in alarms if (s := a(story)) is not None), default=None)

    return alarm


def first_alert(
    story: Story,
    *,
    severities: Sequence[str],
    geometry: bool = False,
    unplanned: bool = False,
) -> int | None:
    """Return the step before which the first such alert was raised."""
    heard = (
        alert["raised"]
        for alert in story.alerts
        if alert["severity"] in severities
        and not (geometry and alert["rule"].startswith(_SCALAR_RULES))
        and not (unplanned and alert["rule"] == "planned_rate")
    )
    return min(heard, default=None)


def _trailing(values: Sequence[float], score: Callable[[float, np.ndarray], float]) -> Scores:
    """Score each value against the 50 before it, from the tenth on."""
    series = np.asarray(values, dtype=float)
    scores = np.full(len(series), -math.inf)
    for step in range(10, len(series)):
        found = score(series[step], series[max(0, step - _WINDOW) : step])
        scores[step] = found if math.isfinite(found) else math.inf
    return scores


def _smooth(losses: Sequence[float]) -> np.ndarray:
    smooth, mean = np.empty(len(losses)), 0.0
    for step, loss in enumerate(losses):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smooth[step] = mean / (1 - _SMOOTHING ** (step + 1))
    return np.nan_to_num(smooth, nan=math.inf, posinf=math.inf)


def _masked(scores: np.ndarray, start: int) -> Scores:
    scores = np.nan_to_num(scores, nan=math.inf, posinf=math.inf)
    scores[:start] = -math.inf
    return scores


def _at_probes(story: Story, quantity: str) -> Scores:
    scores = np.full(len(story.losses), -math.inf)
    for step, value in story.measured(quantity).items():
        if step < len(scores):
            scores[step] = value
    return scores
