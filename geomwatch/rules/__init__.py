"""Rules: what is known of a step in, alerts out. Each file is one alert.

May import observation, estimators, stability, isolation, records and errors. A newcomer would
change something here to be warned of another thing: a class with a name, its levels as fields and
its words in one file, its page beside it in `pages`, and a line in `default_rules`.
"""

from __future__ import annotations

from geomwatch.observation.step import Observation
from geomwatch.rules.batch_noise import BatchNoise
from geomwatch.rules.critical_batch import CriticalBatchSize
from geomwatch.rules.flat_but_rough import FlatButRough
from geomwatch.rules.grad_norm import GradNormSpike
from geomwatch.rules.gradient_margin import GradientMargin
from geomwatch.rules.loss import LossRise
from geomwatch.rules.margin import StabilityMargin
from geomwatch.rules.nonfinite import NonFinite
from geomwatch.rules.planned_rate import PlannedRate
from geomwatch.rules.rate_jump import RateJump
from geomwatch.rules.rule import Rule
from geomwatch.rules.untrusted import UntrustedProbe

__all__ = [
    "BatchNoise",
    "CriticalBatchSize",
    "FlatButRough",
    "GradNormSpike",
    "GradientMargin",
    "LossRise",
    "NonFinite",
    "Observation",
    "PlannedRate",
    "RateJump",
    "Rule",
    "StabilityMargin",
    "UntrustedProbe",
    "default_rules",
]


def default_rules() -> list[Rule]:
    """Return the rules a monitor uses unless told otherwise."""
    return [
        NonFinite(),
        LossRise(),
        StabilityMargin(),
        GradientMargin(),
        BatchNoise(),
        PlannedRate(),
        RateJump(),
        GradNormSpike(),
        FlatButRough(),
        CriticalBatchSize(),
        UntrustedProbe(),
    ]
