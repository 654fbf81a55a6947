"""Controllers: what was observed in, adjustments of a training run out. Only on request."""

from __future__ import annotations

from geomwatch.controllers.batch_size import BatchSizeScaler
from geomwatch.controllers.clipping import GradientClipper
from geomwatch.controllers.conductor import Control
from geomwatch.controllers.learning_rate_cap.cap import LearningRateCap
from geomwatch.controllers.protocol import Controller, Knobs, Move
from geomwatch.controllers.resizable import Accumulation, ResizableBatchSampler

__all__ = [
    "Accumulation",
    "BatchSizeScaler",
    "Control",
    "Controller",
    "GradientClipper",
    "Knobs",
    "LearningRateCap",
    "Move",
    "ResizableBatchSampler",
]
