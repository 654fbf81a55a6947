"""Rules: the history of a run in, alerts out."""

from __future__ import annotations

from geomwatch.rules.loss import LossRise
from geomwatch.rules.margin import StabilityMargin
from geomwatch.rules.nonfinite import NonFinite
from geomwatch.rules.observation import Observation, Rule

__all__ = ["LossRise", "NonFinite", "Observation", "Rule", "StabilityMargin", "default_rules"]


def default_rules() -> list[Rule]:
    """Return the rules a monitor uses unless told otherwise."""
    return [NonFinite(), LossRise(), StabilityMargin()]
