"""Rules: what is known of a step in, alerts out. Each file is one alert.

May import observation, estimators, stability, isolation, records and errors. A newcomer would
change something here to be warned of another thing: a class with a name, its levels as fields and
its words in one file, its page beside it in `pages`, and a line in `default`.
"""

from __future__ import annotations

from geomwatch.observation.batch_noise import NoiseLevels
from geomwatch.observation.gradient_level import GradientLevels
from geomwatch.observation.step import Observation
from geomwatch.rules.advice import Advice, LossAdvice
from geomwatch.rules.bad_batch import BadBatch
from geomwatch.rules.batch_noise import BatchNoise
from geomwatch.rules.critical_batch_size import CriticalBatchSize
from geomwatch.rules.default import DEFAULT, default_rules, resolve
from geomwatch.rules.flat_but_rough import FlatButRough
from geomwatch.rules.grad_norm_spike import GradNormSpike
from geomwatch.rules.gradient_margin import FirstValues, GradientMargin, LastValues
from geomwatch.rules.headroom import Headroom
from geomwatch.rules.loss_rise import LossRise, Means, StartOfLosses
from geomwatch.rules.no_progress import NoProgress
from geomwatch.rules.non_finite import NonFinite
from geomwatch.rules.planned_rate import PlannedRate
from geomwatch.rules.rate_jump import RateJump, StochasticLevels
from geomwatch.rules.rule import Once, Rule, SecondOpinion
from geomwatch.rules.stability_margin import (
    FullBatchLevels,
    LastProbes,
    OwnPast,
    StabilityMargin,
    StartLevels,
)
from geomwatch.rules.taken_step import TakenStep
from geomwatch.rules.untrusted_probe import UntrustedProbe

__all__ = [
    "DEFAULT",
    "Advice",
    "BadBatch",
    "BatchNoise",
    "CriticalBatchSize",
    "FirstValues",
    "FlatButRough",
    "FullBatchLevels",
    "GradNormSpike",
    "GradientLevels",
    "GradientMargin",
    "Headroom",
    "LastProbes",
    "LastValues",
    "LossAdvice",
    "LossRise",
    "Means",
    "NoProgress",
    "NoiseLevels",
    "NonFinite",
    "Observation",
    "Once",
    "OwnPast",
    "PlannedRate",
    "RateJump",
    "Rule",
    "SecondOpinion",
    "StabilityMargin",
    "StartLevels",
    "StartOfLosses",
    "StochasticLevels",
    "TakenStep",
    "UntrustedProbe",
    "default_rules",
    "resolve",
]
