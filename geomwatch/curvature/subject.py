"""What is measured again and again: a model, its loss, its parameters, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from geomwatch.curvature.cutting import Cutter
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import LossFn, Settings
from geomwatch.isolation.outside import Outside
from geomwatch.parallel.ranks import Ranks
from geomwatch.vectors.layout import Layout


@dataclass(frozen=True, eq=False)
class Subject:
    """Makes an Objective for any window of batches; `ranks` are those that it is a mean over."""

    model: nn.Module
    loss_fn: LossFn
    layout: Layout
    how: Settings
    ranks: Ranks
    cutter: Cutter = field(default_factory=Cutter)
    outside: Outside = field(default_factory=Outside)

    def __post_init__(self) -> None:
        self.cutter.items = self.how.items

    def on(self, window: Sequence[Any], **options: Any) -> Objective:
        """Return the loss on a window; `options` are an Objective's own."""
        return Objective(
            self.model,
            self.loss_fn,
            window,
            self.how,
            layout=self.layout,
            ranks=self.ranks,
            cutter=self.cutter,
            outside=self.outside,
            **options,
        )

    def alone(self) -> Subject:
        """Return the same of this rank alone."""
        return replace(self, ranks=Ranks())

    def set(self, **settings: Any) -> Subject:
        """Return the same by other settings."""
        return replace(self, how=replace(self.how, **settings))
