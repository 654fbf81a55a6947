"""How much of the stochastic margin is the noise of batches, and how much of it a start bears."""

from __future__ import annotations

from dataclasses import dataclass

from geomwatch.observation.step import Observation

# Chosen on runs of three nets, between healthy and failing ones (docs/decisions/020).
_SGD = 0.3  # runs at up to 4 x their tuned rate had .26 at most, failing ones .32 at least
_SGD_PEAK = 0.4  # of a planned peak: .14 at most, .48 at least
_ADAPTIVE = 1.8  # from step 2 on: 1.76 at most
_FIRST_ADAPTIVE, _FIRST_MARGIN = 4.0, 0.6  # before: 3.1 at most, 5.0 at least, and the margin
YOUNG = range(11)  # steps; noise grows, so that levels are those of a start
_SETTLED = 2  # steps, after which a preconditioner has seen more than one gradient
_AIMED, _AIMED_ADAPTIVE = 0.1, 0.5  # what runs at their tuned rates have
_AIMED_MARGIN = 0.15  # and their margin


@dataclass(frozen=True, slots=True)
class NoisePart:
    """The noise part N = M_ms - M of a probe, at the rates it was measured at."""

    value: float
    error: float
    margin: float  # M, of the full batch

    def counted(self, step: Observation) -> float:
        """Return N, or of methods that adapt before step 2 what of it counts: min(N, 6.7 M).

        v is a single squared gradient then: a fresh head on a pretrained net has an N of up to 190,
        at a margin of .2 and a good rate.
        """
        if not step.adaptive or step.index >= _SETTLED:
            return self.value
        return min(self.value, _FIRST_ADAPTIVE / _FIRST_MARGIN * self.margin)

    def excess(self, step: Observation, *, growth: float = 1.0) -> float:
        """Return N over the level of a start, at `growth` times the rate: above 1 is too much."""
        return growth * self.counted(step) / self.level(step, planned=growth > 1)

    @staticmethod
    def level(step: Observation, *, planned: bool = False) -> float:
        """Return how much noise is too much in the first steps, or at a peak that is planned."""
        if not step.adaptive:
            return _SGD_PEAK if planned else _SGD
        return _ADAPTIVE if step.index >= _SETTLED else _FIRST_ADAPTIVE

    def factor(self, step: Observation, *, growth: float = 1.0) -> float:
        """Return what to multiply that rate by so that N is what good rates have.

        Or M, whichever asks less, where both have to be high (see `counted`).
        """
        if not step.adaptive:
            return min(_AIMED / (growth * self.value), 1.0)
        noise = _AIMED_ADAPTIVE / (growth * self.value)
        if step.index >= _SETTLED:
            return min(noise, 1.0)
        return min(max(noise, _AIMED_MARGIN / (growth * self.margin)), 1.0)


def noise_part(step: Observation) -> NoisePart | None:
    """Return the noise part that this step's probe has measured; None if it could not, or not yet.

    Not where every step sees the same data: what differs within the batch is no noise there.
    """
    estimates = step.estimates or {}
    mean_square, margin = estimates.get("stochastic_margin"), step.margin
    if not step.fresh or step.same_data or mean_square is None or margin is None:
        return None
    if mean_square.status != "ok" or margin.status != "ok":
        return None
    if mean_square.value is None or margin.value is None or margin.value <= 0:
        return None
    noise = max(mean_square.value - margin.value, 0.0)
    error = mean_square.error or 0.0
    return NoisePart(noise, error, margin.value) if noise > error else None
