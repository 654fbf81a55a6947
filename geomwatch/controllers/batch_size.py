"""Raises the batch where noise, and not curvature itself, makes the rate too large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geomwatch.controllers.actuators import BATCH, LR, Actuator
from geomwatch.controllers.protocol import Knobs, Move, check_above
from geomwatch.controllers.resizable import SampledBatches
from geomwatch.curvature.checks import check_count
from geomwatch.observation.margins import SmoothedMargin
from geomwatch.records import Alert, Estimate
from geomwatch.rules import Observation
from geomwatch.rules.rule import Persistence

_SMOOTHING = 0.5  # weight of the past; measurements are few
_AT_ONCE = 2.0  # largest factor of one move
_MOST = 16  # times the loop's own batch, where no `max_batch` is given
_SHRINK = 0.7  # of the limit, that the margin must stay below with half the batch


@dataclass(frozen=True, slots=True)
class _Parts:
    """The two parts of the stochastic margin at the user's rate."""

    curvature: float  # D, the deterministic margin: what is left in the full-batch limit
    noise: float  # N = M_ms - D, in inverse proportion to the batch


class BatchSizeScaler:
    """Chooses between a larger batch and a lower rate, by computing what each would do.

    The stochastic margin of a step is M_ms = D + N: the deterministic margin D and the part N of
    batches that differ in curvature, which falls as 1 / batch (see `stochastic_margin`). Where
    M_ms > `limit`:

    - D >= limit: only a lower rate helps; said once, unless a LearningRateCap sees to it,
    - D < limit and N > D: the batch is multiplied by k = ceil(N / (limit - D)), in powers of two
      and at most doubled at once; the rate stays, which is what makes steps less noisy.

    Not beyond `noise_scale` times the gradient noise scale (McCandlish et al. 2018: larger batches
    then hardly save steps), nor beyond `max_batch`. It goes down again by halves while M_ms would
    stay below 0.7 of the limit. Nothing is done where every step sees the same data.

    Needs `stochastic_margin` and `gradient_noise_scale`, which the monitor then measures at every
    probe: about three steps each time. Of a single batch of fewer than 16 items, or one that a
    BatchNorm normalises, they can't be had: accumulate, so that micro-batches can be compared.

    Args:
        limit: the stochastic margin to stay below. At 1 the mean square of steps stops shrinking,
            and runs that train well stay near it.
        max_batch: items, on all ranks together; 16 times the first batch by default.
        noise_scale: largest batch in units of the gradient noise scale.
        patience: optimizer steps that the noise must be too large before the batch grows.
        cooldown: optimizer steps between two changes.
        through: a ResizableBatchSampler, a DataLoader that draws from one, or an Accumulation.
            Hosts that can change their batch need none.

    Raises:
        UsageError: a number outside its range, or `through` is none of these.
    """

    knob = BATCH
    needs = ("stochastic_margin", "gradient_noise_scale")

    def __init__(
        self,
        *,
        limit: float = 1.5,
        max_batch: int | None = None,
        noise_scale: float = 4.0,
        patience: int = 10,
        cooldown: int = 50,
        through: Any = None,
    ) -> None:
        check_above("limit", limit, 0)
        check_above("noise_scale", noise_scale, 0)
        check_count("patience", patience, 0)
        check_count("cooldown", cooldown, 0)
        if max_batch is not None:
            check_count("max_batch", max_batch, 1)
        self.through = _actuator_of(through)
        self._limit, self._max_batch, self._noise_scale = float(limit), max_batch, noise_scale
        self._cooldown = cooldown
        self._curvature, self._noise = SmoothedMargin(_SMOOTHING), SmoothedMargin(_SMOOTHING)
        self._critical: float | None = None  # the gradient noise scale, in items
        self._base: float | None = None  # items of the loop's own batch
        self._noisy, self._calm = Persistence(patience), Persistence(patience)
        self._changed = -math.inf  # the step of the last change
        self._advised = False

    def __call__(
        self, step: Observation, alerts: Sequence[Alert] = (), knobs: Knobs | None = None
    ) -> Sequence[Move]:
        """Look at one step; only a fresh measurement of both margins moves anything."""
        present = 1.0 if knobs is None else knobs.values.get(BATCH, 1.0)
        parts = self._measure(step, present)
        if parts is None:
            return ()
        total = parts.curvature + parts.noise
        if parts.curvature >= self._limit:
            self._noisy(False, step.index)
            return self._advice(step, parts, knobs)
        noisy = self._noisy(total > self._limit and parts.noise > parts.curvature, step.index)
        small = parts.curvature + 2 * parts.noise < _SHRINK * self._limit
        calm = self._calm(small and present > 1, step.index)
        if step.index - self._changed < self._cooldown:
            return ()
        if noisy:
            return self._grow(step, parts, present)
        return (
            self._move(step, present / _AT_ONCE, _calm_reason(parts, self._limit)) if calm else ()
        )

    def _measure(self, step: Observation, present: float) -> _Parts | None:
        """Take in the margins of a probe; None where it has not measured both."""
        if not step.fresh or step.estimates is None or step.same_data or not step.lr:
            return None
        scale = _fresh(step.estimates.get("gradient_noise_scale"))
        if scale is not None:  # geometric: it spreads over decades
            past = self._critical or scale
            self._critical = past**_SMOOTHING * scale ** (1 - _SMOOTHING)
        if self._base is None and step.items:
            self._base = step.items / present
        total = step.estimates.get("stochastic_margin")
        whole, det = _fresh(total), _fresh(step.estimates.get("stability_margin"))
        if whole is None or det is None or not max(step.lr) > 0:
            return None
        noise = Estimate(max(whole - det, 0.0))
        if not self._curvature.update(Estimate(det), step.lr):
            return None
        self._noise.update(noise, step.lr)
        return _Parts(self._curvature.at(step.lr), self._noise.at(step.lr))

    def _grow(self, step: Observation, parts: _Parts, present: float) -> Sequence[Move]:
        wanted = math.ceil(parts.noise / (self._limit - parts.curvature))
        to = present * min(_AT_ONCE, 2.0 ** math.ceil(math.log2(max(wanted, 2))))
        if to > self._most() * (1 + 1e-9):
            return ()
        total = parts.curvature + parts.noise
        reason = (
            f"the stochastic margin {total:.3g} is above {self._limit:g}, {parts.noise:.3g} of it "
            f"from the noise of batches, which {wanted} x the batch would bring down"
        )
        return self._move(step, to, reason)

    def _most(self) -> float:
        """Return the largest multiple of the loop's own batch that is allowed."""
        most = float(_MOST)
        if self._base:
            if self._max_batch is not None:
                most = self._max_batch / self._base
            if self._critical is not None:
                most = min(most, self._noise_scale * self._critical / self._base)
        return most

    def _move(self, step: Observation, to: float, reason: str) -> Sequence[Move]:
        self._changed = step.index
        # what was measured with another batch says little of the noise of this one
        self._noise = SmoothedMargin(_SMOOTHING)
        self._noisy(False, step.index)
        self._calm(False, step.index)
        return [Move(BATCH, to, reason)]

    def _advice(self, step: Observation, parts: _Parts, knobs: Knobs | None) -> Sequence[Move]:
        """Say once that no batch can help, where no controller lowers the rate."""
        capped = knobs is not None and LR in knobs.values
        if self._advised or capped or parts.curvature + parts.noise <= self._limit:
            return ()
        self._advised = True
        factor = 0.5 * self._limit / parts.curvature
        reason = (
            f"the margin of the curvature alone is {parts.curvature:.3g}, above {self._limit:g}: a "
            "larger batch can't help, a lower learning rate can"
        )
        return [Move(LR, factor * max(step.lr), reason, advice=True)]

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "curvature": self._curvature,
            "noise": self._noise,
            "noisy": self._noisy,
            "calm": self._calm,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the smoothed margins, the noise scale and the last change."""
        return {name: part.state_dict() for name, part in self._parts.items()} | {
            "critical": self._critical,
            "base": self._base,
            "changed": self._changed if math.isfinite(self._changed) else None,
            "advised": self._advised,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self._critical, self._base = state["critical"], state["base"]
        self._changed = -math.inf if state["changed"] is None else state["changed"]
        self._advised = state["advised"]


def _actuator_of(through: Any) -> Actuator | None:
    if through is None or hasattr(through, "set"):
        found: Actuator | None = through
        return found
    return SampledBatches(through)


def _fresh(estimate: Estimate | None) -> float | None:
    """Return the value measured at this step, if it was."""
    if estimate is None or estimate.status != "ok" or estimate.value is None:
        return None
    return estimate.value if math.isfinite(estimate.value) else None


def _calm_reason(parts: _Parts, limit: float) -> str:
    total = parts.curvature + 2 * parts.noise
    return f"half the batch would keep the stochastic margin at {total:.3g}, well below {limit:g}"
