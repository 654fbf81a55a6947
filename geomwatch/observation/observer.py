"""What is known of a run besides the present step: found out once, for rules and controllers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from geomwatch.estimators.noise_floor import NO_FUNCTION
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.batch_noise import noise_ratio
from geomwatch.observation.documented import GUESS, Documented, level
from geomwatch.observation.margins import growth, value_of
from geomwatch.observation.step import Observation
from geomwatch.records import Estimate

# Quantities that compare losses, which tells whether two evaluations agree.
_BY_LOSSES = (
    "roughness",
    "roughness_residual",
    "normalized_sharpness",
    "normalized_sharpness_linf",
)


_KNOWN = ("cap", "jump", "noise", "is_noisy", "is_quiet", "agreed", "doubt")
_known = attrgetter(*_KNOWN)


@dataclass(kw_only=True, eq=False, repr=False)
class Observer(Documented, Resumable):
    """Adds to each observation what earlier ones have shown; called once a step.

    *How much batches disagree*: the stochastic margin over that of the full batch. Noise dominates
    above `noisy`: most of it is then what a larger batch would take away. Below `quiet`, at a
    margin of at least `near`, it hardly matters, until it is above `still`: a GPT under SGD lives
    by the limit of the full batch, though its batches are small. What was measured is believed up
    to `lasts` times its step, and up to `holds` times its rate: noise grows as the loss falls. That
    batches agree does not make a run deterministic: at the start of mini-batch runs, those that
    fail included, they do, so that nothing is concluded before step `settles`.

    *Whether a margin can be believed.* Not where double backward was found wrong and is used all
    the same, where the loss differs between two evaluations at the same weights, as the last probe
    that looked had it, or where the margin's own error exceeds it and reaches beyond `matters`. A
    large error below that is no reason: a Ritz value is a lower bound of the largest eigenvalue, so
    that a margin above its limit stays above it.
    """

    settles: int = level(
        20,
        "step from which on agreeing tells",
        source="decision 012 why; a guess",
    )
    lasts: float = level(3.0, "times its step: believed so long", source="decision 019: a GPT")
    holds: float = level(2.0, "times its rate: believed so far", source=GUESS)
    quiet: float = level(1.3, "M_ms / M: batches agree below", source="decision 018")
    still: float = level(1.8, "M_ms / M: they go on to below", source="decision 018: a ramp")
    noisy: float = level(2.5, "M_ms / M: noise dominates above", source="decision 012")
    near: float = level(0.1, "margin from which on agreeing tells", source=GUESS)
    matters: float = level(0.5, "margin that needs belief", source=GUESS)

    _noise: Kept[float | None] = field(init=False, default=None)  # M_ms / M
    _agreed: Kept[bool] = field(init=False, default=False)
    _step: Kept[int] = field(init=False, default=0)  # of that look, and its rate
    _rate: Kept[float] = field(init=False, default=0.0)
    _rates: Kept[tuple[float, ...]] = field(init=False, default=())  # of the step before
    _last: int = field(init=False, default=-1)
    _moving: Kept[bool] = field(init=False, default=False)  # the loss is no function of the weights

    def __call__(self, step: Observation, cap: float = math.inf) -> Observation:
        """Take note of a step, at the rates that a cap leaves it; return it with what is known."""
        seen = step if cap == math.inf else replace(step, cap=cap).applied
        jump = 1.0 if seen.lr == self._rates else growth(seen.lr, self._rates)
        self._rates, self._last = seen.lr, step.index
        if step.estimates is not None:
            self._note(seen, step.estimates)
        is_known = self._noise is not None and step.index <= self.lasts * self._step
        holds = is_known and max(seen.lr, default=0.0) <= self.holds * self._rate
        noise = 1.0 if step.same_data else self._noise if holds else None
        is_noisy = (self._noise or 0.0) > self.noisy if is_known else None
        is_noisy = False if step.same_data else is_noisy
        is_quiet, doubt = step.same_data or (holds and self._agreed), self._doubt(seen)
        known: tuple[Any, ...] = (cap, jump, noise, is_noisy, is_quiet, self._agreed, doubt)
        if known == _known(step):  # most steps: a copy costs more than all of this
            return step
        return replace(step, **dict(zip(_KNOWN, known, strict=True)))

    @property
    def known_until(self) -> float:
        """The step after which what is known of batch noise is no longer believed."""
        until = math.floor(self.lasts * self._step)
        return math.inf if self._noise is None or self._last > until else until + 1

    def _note(self, step: Observation, estimates: Mapping[str, Estimate]) -> None:
        found = noise_ratio(estimates)
        if found is not None and step.index >= self.settles:
            self._noise, self._step, self._rate = found, step.index, max(step.lr, default=0.0)
            self._agreed = self.agrees(estimates, still=self._agreed)
        looked = [e for n in _BY_LOSSES if (e := estimates.get(n)) is not None and e.age == 0]
        if looked:
            self._moving = looked[0].reason.startswith(NO_FUNCTION)

    def agrees(self, estimates: Mapping[str, Estimate], *, still: bool) -> bool:
        """Tell whether batches agree on the curvature, at a margin that counts.

        `still` if they did so before: measured anew, their noise is now a little above a limit and
        now a little below.
        """
        noise, margin = noise_ratio(estimates), value_of(estimates.get("stability_margin"))
        limit = self.still if still else self.quiet
        return noise is not None and noise < limit and (margin or 0.0) >= self.near

    def _doubt(self, step: Observation) -> str:
        """Return the reason why the margin must not be believed, "" where there is none."""
        how = step.provenance or {}
        if how.get("validation_failed") and how.get("backend") == "double_backward":
            return str(how.get("validation", "double backward is wrong"))
        if self._moving:
            return NO_FUNCTION
        margin = step.margin if step.fresh else None
        if margin is None or margin.value is None or margin.error is None:
            return ""
        if margin.error > max(abs(margin.value), self.matters - margin.value):
            return f"its error {margin.error:.2g} exceeds the margin {margin.value:.2g} itself"
        return ""
