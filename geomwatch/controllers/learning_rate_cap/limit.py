"""What the margins have to stay below under the cap, as far as micro-batches can tell."""

from __future__ import annotations

from dataclasses import dataclass

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.documented import Documented, level
from geomwatch.observation.margins import value_of
from geomwatch.observation.observer import Observer
from geomwatch.observation.step import Observation


@dataclass(frozen=True, kw_only=True, repr=False)
class CapLimits(Documented):
    """What `LearningRateCap` holds the margins below where it is given no `c_bs`.

    The gradient margin G, by what is known of the stochastic margin M_ms; and at a start (see
    `Start`) both parts of M_ms = M + N: the margin of the full batch and the noise.
    """

    sgd: float = level(2.0, "limit of G without micro-batches, SGD", source="decision 013")
    adaptive: float = level(
        1.0, "the same for methods that adapt, as Adam", source="decisions 013 and 016"
    )
    stochastic: float = level(
        1.25, "limit of M_ms, which that of G follows from", source="decision 019: eleven nets"
    )
    least: float = level(1.0, "smallest limit of G that follows", source="decision 019")
    most: float = level(2.0, "largest limit of G that follows", source="decision 019")
    quiet: float = level(5.0, "limit of G where batches agree", source="decision 019: one GPT")
    full_batch: float = level(
        2.0, "limit of G where all steps see the same, over that of M", source="decision 013"
    )
    start_noise_sgd: float = level(0.1, "limit of N at a start, SGD", source="decision 021")
    start_noise_adaptive: float = level(
        1.0, "the same for methods that adapt, as Adam", source="decision 021"
    )
    start_margin: float = level(0.7, "limit of M at a start", source="decision 021")
    fallen: float = level(
        2.0,
        "standard errors by which the loss has to fall for a start to end",
        source="decision 016",
    )


class Limit(Resumable):
    """Translates the limit of the mean square into one of the gradient margin.

    Healthy runs at their tuned rates have a stochastic margin M_ms near 1, whatever the net, where
    noise matters; the margin G along the gradient, which costs a fraction, is then anything from .5
    to 3. So the limit of G is what it would be at M_ms = 1.25 by the last probe that had both, but
    between 1 and 2: a probe sees one batch, and older ones saw less noise. Where noise hardly
    matters (see `Observer`) M_ms says nothing, and it is 5. Without micro-batches, as with
    BatchNorm, it is 2 for SGD and 1 for methods that adapt. Never more than `limit_ratio`, where
    the full batch is unstable as well: 1 without momentum, 3 with one of 0.5, 19 with 0.9.
    """

    _share: Kept[float | None]  # G / M_ms

    def __init__(self, limits: CapLimits) -> None:
        self._limits = limits
        self._share = None

    def update(self, step: Observation) -> None:
        """Take note of what a probe has measured."""
        whole = value_of(step.measured("stochastic_margin"))
        along = value_of(step.gradient_margin)
        if step.index >= Observer.settles and whole and along is not None:
            self._share = along / whole

    def at(self, step: Observation) -> float:
        """Return the limit, in units of that of small batches; never beyond that of full ones."""
        return min(self._by_noise(step), step.limit_ratio)

    def _by_noise(self, step: Observation) -> float:
        limits = self._limits
        if step.agreed:
            return limits.quiet
        if self._share is None:
            return limits.adaptive if step.adaptive else limits.sgd
        return min(max(limits.stochastic * self._share, limits.least), limits.most)
