"""How an alarm does on runs whose end is known, and thresholds that are frozen beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from harness.detectors import Alarm, Detector
from harness.stats import Median, Share
from harness.story import Story

MOST_FALSE = 0.05  # of the healthy runs, in the half that thresholds are chosen on
BY_STEP = 10  # a rate too large from the start has to be announced
EARLY = 20  # steps of lead that leave time to act


@dataclass(frozen=True)
class Score:
    """False alarms in healthy runs, failing runs announced, and by how many steps."""

    false: Share
    recall: Share
    early: Share  # announced by 20 steps or more
    lead: Median  # of the runs announced


def healthy(stories: Iterable[Story]) -> list[Story]:
    return [s for s in stories if s.outcome.label == "healthy"]


def failed(stories: Iterable[Story], *scenarios: str) -> list[Story]:
    """Keep the failing runs, of some scenarios or of all."""
    return [
        s
        for s in stories
        if s.outcome.label == "failed" and (not scenarios or s.run.scenario in scenarios)
    ]


def score(alarm: Alarm, well: Sequence[Story], ill: Sequence[Story]) -> Score:
    """Count; a failing run is announced when the alarm is raised before the step of its event."""
    leads = [lead for s in ill if (lead := lead_of(alarm, s)) > 0]
    return Score(
        false=Share(sum(alarm(s) is not None for s in well), len(well)),
        recall=Share(len(leads), len(ill)),
        early=Share(sum(lead >= EARLY for lead in leads), len(ill)),
        lead=Median(leads),
    )


def lead_of(alarm: Alarm, story: Story) -> int:
    """Return by how many steps a failing run is announced, 0 when it is not."""
    raised, event = alarm(story), story.outcome.event
    return 0 if raised is None or event is None else max(event - raised, 0)


def by_step_ten(alarm: Alarm, stories: Sequence[Story]) -> Share:
    """Count runs with an alarm by step 10; one that ends in NaN earlier, before that."""
    return Share(sum(_in_time(alarm(s), s) for s in stories), len(stories))


def before_end(alarm: Alarm, stories: Sequence[Story]) -> Share:
    """Count runs with an alarm by step 10, or later but before the loss blows up."""
    timely = [s for s in stories if _in_time(alarm(s), s) or lead_of(alarm, s) > 0]
    return Share(len(timely), len(stories))


def _in_time(raised: int | None, story: Story) -> bool:
    event = story.outcome.event
    if raised is None or event is None:
        return False
    return raised <= BY_STEP and (event >= BY_STEP or raised < event)


def freeze(detector: Detector, well: Sequence[Story], most: float = MOST_FALSE) -> float:
    """Return the lowest threshold at which at most a share `most` of healthy runs alarm."""
    peaks = sorted((_peak(detector, s) for s in well), reverse=True)
    if not peaks:
        return math.inf
    allowed = math.floor(most * len(peaks) + 1e-9)
    return peaks[min(allowed, len(peaks) - 1)]


@dataclass(frozen=True)
class Curve:
    """Share of healthy runs alarmed and of failing runs announced, as the threshold falls."""

    false: np.ndarray
    recall: np.ndarray

    def recall_at(self, false: float) -> float:
        """Return the best recall at no more false alarms: a threshold chosen in hindsight."""
        allowed = self.recall[self.false <= false + 1e-9]
        return float(allowed.max()) if len(allowed) else 0.0


def curve(detector: Detector, well: Sequence[Story], ill: Sequence[Story]) -> Curve:
    """Compute the ROC curve: announced means before the event, as everywhere."""
    peaks = np.array([_peak(detector, s) for s in well])
    before = np.array([_peak(detector, s, until=s.outcome.event) for s in ill])
    thresholds = np.unique(np.concatenate([peaks, before, [-math.inf, math.inf]]))[::-1]
    return Curve(
        false=np.array([(peaks > t).mean() if len(peaks) else 0.0 for t in thresholds]),
        recall=np.array([(before > t).mean() if len(before) else 0.0 for t in thresholds]),
    )


def _peak(detector: Detector, story: Story, until: int | None = None) -> float:
    scores = detector.score(story)[:until]
    return float(scores.max()) if len(scores) else -math.inf
