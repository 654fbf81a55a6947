"""Controllers: what was observed in, adjustments of a training run out. Only on request.

May import observation, stability, isolation, records, errors and sinks. A newcomer would change
something here to adjust another thing: a class as `protocol` describes it decides, and one in
`actuators` turns the knob.
"""

from __future__ import annotations

from geomwatch.controllers.batch_size import BatchSizeScaler
from geomwatch.controllers.clipping import GradientClipper
from geomwatch.controllers.learning_rate_cap.cap import LearningRateCap
from geomwatch.controllers.learning_rate_cap.history import BaseRateTest, StallTest
from geomwatch.controllers.learning_rate_cap.limit import CapLimits
from geomwatch.controllers.protocol import Controller, Knobs, Move
from geomwatch.controllers.resizable import Accumulation, ResizableBatchSampler
from geomwatch.controllers.skipping import SkipStep

__all__ = [
    "Accumulation",
    "BaseRateTest",
    "BatchSizeScaler",
    "CapLimits",
    "Controller",
    "GradientClipper",
    "Knobs",
    "LearningRateCap",
    "Move",
    "ResizableBatchSampler",
    "SkipStep",
    "StallTest",
]
