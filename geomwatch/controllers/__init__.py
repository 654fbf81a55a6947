"""Controllers: what was observed in, adjustments of a training run out. Only on request."""

from __future__ import annotations

from geomwatch.controllers.control import Control
from geomwatch.controllers.controller import Controller, Knobs, Move
from geomwatch.controllers.lr_cap import LearningRateCap

__all__ = ["Control", "Controller", "Knobs", "LearningRateCap", "Move"]
