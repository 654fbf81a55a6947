"""Raises the batch where noise, and not curvature itself, makes the rate too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from geomwatch.controllers.actuators import BATCH, LR, Actuator
from geomwatch.controllers.protocol import Knobs, Move, abstained
from geomwatch.controllers.resizable import SampledBatches
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import GUESS, Documented, between, level, option, whole
from geomwatch.observation.margins import SmoothedMargin, value_of
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Estimate


@dataclass(kw_only=True, eq=False, repr=False)
class BatchSizeScaler(Documented, Resumable):
    """Chooses between a larger batch and a lower rate, by computing what each would do.

    The stochastic margin of a step is M_ms = D + N: the deterministic margin D and the part N of
    batches that differ in curvature, which falls as 1 / batch (see `stochastic_margin`). Where
    M_ms > `limit`:

    - D >= limit: only a lower rate helps; said once, unless a LearningRateCap sees to it,
    - D < limit and N > D: the batch is multiplied by k = ceil(N / (limit - D)), in powers of two
      and at most doubled at once; the rate stays, which is what makes steps less noisy.

    Not beyond `noise_scale` times the gradient noise scale (McCandlish et al. 2018: larger batches
    then hardly save steps), nor beyond `max_batch`. It goes down again by halves while M_ms would
    stay below `shrink` of the limit. Nothing is done where every step sees the same data.

    Needs `stochastic_margin` and `gradient_noise_scale`, which the monitor then measures at every
    probe: about three steps each time. Of a single batch of fewer than 16 items, or one that a
    BatchNorm normalises, or of a loss that does not split into items, they can't be had, and it
    abstains by that reason: accumulate, so that micro-batches can be compared.

    Raises:
        UsageError: a number outside its range, or `through` is none of these.
    """

    knob: ClassVar[str] = BATCH
    needs: ClassVar[tuple[str, ...]] = ("stochastic_margin", "gradient_noise_scale")

    limit: float = level(
        1.5,
        "stochastic margin to stay below; at 1 the mean square of steps stops shrinking",
        source="decision 013",
    )
    max_batch: int | None = option(
        None,
        "largest batch, in items of all ranks; by default `max_factor` times the first one",
        check=whole(1),
    )
    max_factor: float = level(16.0, "largest multiple of the loop's own batch", source=GUESS)
    noise_scale: float = level(
        4.0, "largest batch in units of the gradient noise scale", source="decision 013"
    )
    smoothing: float = level(
        0.5, "weight of the past in all means, few as probes are", source=GUESS, check=between(0, 1)
    )
    shrink: float = level(
        0.7, "share of `limit` that half the batch has to keep", source=GUESS, check=between(0, 1)
    )
    aim: float = level(
        0.5, "share of `limit` that an advised rate would have", source=GUESS, check=between(0, 1)
    )
    patience: int = level(
        10,
        "steps that the batch must have been too small or too large",
        source=GUESS,
        check=whole(0),
    )
    cooldown: int = level(50, "steps between two changes", source=GUESS, check=whole(0))
    through: Any = option(
        None,
        "Accumulation, ResizableBatchSampler or DataLoader that draws from one; not in hosts",
    )
    dry_run: bool = option(False, "log what would be done, and do nothing")

    _curvature: Kept[SmoothedMargin] = field(init=False)
    _noise: Kept[SmoothedMargin] = field(init=False)
    # the gradient noise scale, and the loop's own batch, in items
    _critical: Kept[float | None] = field(init=False, default=None)
    _base: Kept[float | None] = field(init=False, default=None)
    # steps: since when the batch is too noisy, or larger than it need be, and of the last change
    _noisy_since: Kept[int | None] = field(init=False, default=None)
    _calm_since: Kept[int | None] = field(init=False, default=None)
    _changed: Kept[int | None] = field(init=False, default=None)
    _advised: Kept[bool] = field(init=False, default=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.through = _actuator_of(self.through)
        self._curvature = SmoothedMargin(self.smoothing)
        self._noise = SmoothedMargin(self.smoothing)

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Look at one step; only a fresh measurement of both margins moves anything."""
        present = 1.0 if knobs is None else knobs.values.get(BATCH, 1.0)
        cannot = self._cannot(step)
        if cannot:
            return abstained(BATCH, cannot)
        if not self._measure(step, present):
            return ()
        curvature, noise = self._curvature.at(step.lr), self._noise.at(step.lr)
        total, halved = curvature + noise, curvature + 2 * noise
        if curvature >= self.limit:
            self._noisy_since = None
            capped = knobs is not None and LR in knobs.values
            return () if capped or total <= self.limit else self._advice(step, curvature)
        is_noisy = total > self.limit and noise > curvature
        is_calm = halved < self.shrink * self.limit and present > 1
        self._noisy_since = _since(is_noisy, self._noisy_since, step)
        self._calm_since = _since(is_calm, self._calm_since, step)
        if self._changed is not None and step.index - self._changed < self.cooldown:
            return ()
        if self._lasts(self._noisy_since, step):
            return self._grow(step, present, curvature, noise)
        return self._halve(step, present, halved) if self._lasts(self._calm_since, step) else ()

    def _cannot(self, step: Observation) -> str:
        """Return why the noise of batches can't be had in this run; "" where it was, or may be."""
        noise = (step.estimates or {}).get("stochastic_margin")
        is_refused = noise is not None and noise.status in ("withheld", "unknown", "directional")
        known = self._noise.known or step.same_data
        return "" if noise is None or known or not is_refused else noise.reason

    def _lasts(self, since: int | None, step: Observation) -> bool:
        return since is not None and step.index - since >= self.patience

    def _measure(self, step: Observation, present: float) -> bool:
        """Take in the margins of a probe, at the user's rate; False where it hasn't both."""
        if not step.fresh or step.same_data or not step.lr:
            return False
        scale = _finite(step.measured("gradient_noise_scale"))
        if scale is not None:  # geometric: it spreads over decades
            past = self._critical or scale
            self._critical = past**self.smoothing * scale ** (1 - self.smoothing)
        if self._base is None and step.items:
            self._base = step.items / present
        total = _finite(step.measured("stochastic_margin"))
        curvature = _finite(step.measured("stability_margin"))
        if total is None or curvature is None or not max(step.lr) > 0:
            return False
        self._noise.update(Estimate(max(total - curvature, 0.0)), step.lr)
        return self._curvature.update(Estimate(curvature), step.lr)

    def _grow(
        self, step: Observation, present: float, curvature: float, noise: float
    ) -> Sequence[Move]:
        """Double the batch, which is less than the noise asks for if anything."""
        if 2 * present > self._most() * (1 + 1e-9):
            return ()
        wanted = math.ceil(noise / (self.limit - curvature))
        reason = (
            f"the stochastic margin {curvature + noise:.3g} is above {self.limit:g}, {noise:.3g} "
            f"of it from the noise of batches, which {wanted} x the batch would bring down"
        )
        return self._move(step, 2 * present, reason)

    def _halve(self, step: Observation, present: float, halved: float) -> Sequence[Move]:
        reason = (
            f"half the batch would keep the stochastic margin at {halved:.3g}, well below "
            f"{self.limit:g}"
        )
        return self._move(step, present / 2, reason)

    def _most(self) -> float:
        """Return the largest multiple of the loop's own batch that is allowed."""
        most = self.max_factor
        if self._base:
            if self.max_batch is not None:
                most = self.max_batch / self._base
            if self._critical is not None:
                most = min(most, self.noise_scale * self._critical / self._base)
        return most

    def _move(self, step: Observation, to: float, reason: str) -> Sequence[Move]:
        self._changed = step.index
        # what was measured with another batch says little of the noise of this one
        self._noise = SmoothedMargin(self.smoothing)
        self._noisy_since = self._calm_since = None
        return [Move(BATCH, to, reason)]

    def _advice(self, step: Observation, curvature: float) -> Sequence[Move]:
        """Say once that no batch can help."""
        if self._advised:
            return ()
        self._advised = True
        reason = (
            f"the margin of the curvature alone is {curvature:.3g}, above {self.limit:g}: a "
            "larger batch can't help, a lower learning rate can"
        )
        lower = self.aim * self.limit / curvature * max(step.lr)
        return [Move(LR, lower, reason, advice=True)]


def _since(present: bool, since: int | None, step: Observation) -> int | None:
    """Return the step since which a condition holds, None where it doesn't."""
    if not present:
        return None
    return step.index if since is None else since


def _actuator_of(through: Any) -> Actuator | None:
    if through is None or hasattr(through, "set"):
        found: Actuator | None = through
        return found
    return SampledBatches(through)


def _finite(estimate: Estimate | None) -> float | None:
    """Return what was measured at this step, if it is a number."""
    value = value_of(estimate)
    return value if value is not None and math.isfinite(value) else None
