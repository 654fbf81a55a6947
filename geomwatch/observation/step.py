"""One optimizer step as rules, schedule and controllers see it, before it is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geomwatch.records import Estimate


@dataclass(frozen=True, slots=True)
class Settled:
    """What is known of an optimizer step once it is over."""

    step: int
    loss: float | None
    grad_norm: float
    stepped: bool  # False when a GradScaler left the step out


@dataclass(frozen=True, slots=True)
class Observation:
    """One optimizer step as the rules see it, before the step is taken.

    `margin` is the stability margin at this step's learning rate: measured now when `fresh`,
    otherwise the last one re-scaled; `gradient_margin`, measured more often, is the small-batch
    margin along the coming preconditioned step d = S^2 g, limit_ratio * d'(H + W)d / g'd (see
    `stability`): eta BS / (2 (1-mu)) for SGD with momentum, negative where the loss is concave.
    `settled` is what became known of the step before.
    """

    index: int  # optimizer steps taken before it
    lr: tuple[float, ...]
    optimizer: str = "the optimizer"
    margin: Estimate | None = None
    fresh: bool = False
    gradient_margin: Estimate | None = None
    gradient_fresh: bool = False
    cold_start: float = 1.0  # factor of Adam's first steps that both margins leave out
    adaptive: bool = False  # the optimizer preconditions its steps, as Adam does
    limit_ratio: float = 1.0  # full-batch over small-batch limit of the coming step
    peak: tuple[float, ...] = ()  # the highest rate each group is known to be headed for
    same_data: bool = False  # every step sees the same data, as in full-batch training
    estimates: Mapping[str, Estimate] | None = None  # of a probe at this step
    provenance: Mapping[str, str | int | float | bool] | None = None  # the probe obtained them
    loss: float | None = None  # of a probe at this step
    items: int = 0  # of the batch last measured on, over all ranks
    layers: tuple[str, ...] = ()
    settled: Settled | None = None

    @property
    def rate(self) -> float:
        """The largest learning rate; 1 where the optimizer does not tell."""
        return max(self.lr, default=1.0)
