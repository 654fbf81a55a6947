"""One optimizer step as rules, schedule and controllers see it, before it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from geomwatch.observation.findings import Findings, Present, nothing_found
from geomwatch.observation.margins import scaled, scaled_each, within
from geomwatch.observation.movement import Movement
from geomwatch.observation.rehearsed import NO_REHEARSALS, Rehearsals, Rehearsed
from geomwatch.observation.taken import Taken
from geomwatch.records import Estimate


@dataclass(frozen=True, slots=True)
class Settled:
    """What is known of an optimizer step once it is over."""

    step: int
    loss: float | None
    grad_norm: float | None  # None where nobody has asked for it
    stepped: bool  # False when a GradScaler left the step out


@dataclass(frozen=True, slots=True)
class Observation:
    """One optimizer step, before it is taken: what was measured, and what is known from before.

    `margin` is the stability margin at this step's learning rate: measured now when `fresh`,
    otherwise the last one re-scaled; `gradient_margin`, measured more often, is the small-batch
    margin along the coming preconditioned step d = S^2 g, limit_ratio * d'(H + W)d / g'd (see
    `stability`): eta BS / (2 (1-mu)) for SGD with momentum, negative where the loss is concave.
    `settled` is what became known of the step before, `present` what the host knows of this one.
    `inspect()` looks for what is wrong with its batch, `inspect(before=True)` with that of the step
    before: a pass over the batch and one forward pass, for when something is. `rehearsed` is what
    some steps ahead have shown, where the rate has grown; `rehearsals` is to be asked for more, by
    a rule that is about to speak. The last group of fields is what an `Observer` adds from the
    steps before.
    """

    index: int  # optimizer steps taken before it
    lr: tuple[float, ...]
    optimizer: str = "the optimizer"
    margin: Estimate | None = None
    fresh: bool = False
    gradient_margin: Estimate | None = None
    gradient_fresh: bool = False
    cold_start: float = 1.0  # factor of Adam's first steps that both margins leave out
    sets_rate: bool = False  # the optimizer finds its rate itself, as Prodigy does
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
    present: Present | None = None
    taken: Taken | None = None  # the step before, where its own loss was looked at again
    movement: Movement | None = None  # of the weights over some steps, where it was looked at
    inspect: Callable[..., Findings] = field(default=nothing_found, compare=False, repr=False)
    rehearsed: tuple[Rehearsed, ...] = ()
    rehearsals: Rehearsals = field(default=NO_REHEARSALS, compare=False, repr=False)

    unseen: str = ""  # why the last look has found no margin; "" if it has

    cap: float = math.inf  # the largest rate that a controller lets the step take
    jump: float = 1.0  # largest factor by which a group's rate has grown since the step before
    noise: float | None = None  # stochastic over full-batch margin, while that is known to hold
    is_noisy: bool | None = None  # batch noise dominates, at whatever rate; None where not known
    is_quiet: bool = False  # batches agree on the curvature: their noise matters hardly at all
    agreed: bool = False  # they did so when it was last measured, however long ago
    doubt: str = ""  # why the margin can't be believed

    @property
    def rate(self) -> float:
        """The largest learning rate; 1 where the optimizer does not tell."""
        return max(self.lr, default=1.0)

    @property
    def tells_norm(self) -> bool:
        """Whether the norm of the last gradient is known, or what became of the weights."""
        return self.movement is not None or (
            self.settled is not None and self.settled.grad_norm is not None
        )

    @property
    def has_limit(self) -> bool:
        """Whether margins are shares of a limit; without a formula for the optimizer, of none."""
        return self.margin is None or self.margin.status == "ok"

    @property
    def margin_now(self) -> float | None:
        """The stability margin, where this step has measured one."""
        return self.margin.value if self.fresh and self.margin is not None else None

    @property
    def gradient_margin_now(self) -> float | None:
        """The gradient margin, where this step has measured one."""
        margin = self.gradient_margin
        return margin.value if self.gradient_fresh and margin is not None else None

    @property
    def applied(self) -> Observation:
        """The step as the rules judge it: at the rates that a controller lets it take."""
        now, headed = within(self.cap, self.lr), within(self.cap, self.peak)
        if now == headed == 1:
            return self
        return replace(
            self,
            lr=tuple(now * rate for rate in self.lr),
            peak=tuple(headed * rate for rate in self.peak),
            margin=scaled(self.margin, now),
            gradient_margin=scaled(self.gradient_margin, now),
            estimates=None if self.estimates is None else scaled_each(self.estimates, now),
        )

    def measured(self, name: str) -> Estimate | None:
        """Return what this step's probe has measured of a quantity: nothing that is held."""
        found = (self.estimates or {}).get(name)
        return None if found is None or found.status == "held" else found
