"""How much of the stochastic margin is the noise of batches, and how much of it a start bears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geomwatch.observation.documented import Documented, level
from geomwatch.observation.margins import value_of
from geomwatch.observation.step import Observation
from geomwatch.records import Estimate


@dataclass(frozen=True, kw_only=True, repr=False)
class NoiseLevels(Documented):
    """How much noise is too much for a start: it grows about tenfold as the loss falls."""

    sgd: float = level(0.3, "noise part N of SGD", source="decision 020: healthy .26, failing .32")
    adaptive: float = level(1.8, "N of methods that adapt", source="decision 020: healthy 1.76")
    first: float = level(4.0, "N of these before `settled`", source="decision 020: healthy 3.1")
    first_margin: float = level(
        0.6,
        "margin that goes with it",
        source="decision 021: a fresh head",
    )
    planned: float = level(0.4, "N of SGD at a planned peak", source="decision 020: healthy .14")
    settled: int = level(2, "steps until v has seen two gradients", source="theory")
    young: int = level(10, "the last step of a start", source="decision 020")
    limit: float = level(1.0, "M_ms that is unstable in the mean square", source="theory")
    errors: float = level(
        2.0, "standard errors that M_ms has to be beyond it", source="theory: two are 95 %"
    )
    aimed: float = level(0.1, "N that advice aims for, of SGD", source="decision 020: tuned rates")
    aimed_adaptive: float = level(0.5, "the same of methods that adapt", source="decision 020")
    aimed_margin: float = level(0.15, "margin aimed for before `settled`", source="decision 020")

    def at(self, step: Observation, *, planned: bool = False) -> float:
        """Return how much noise is too much in the first steps, or at a peak that is planned."""
        if not step.adaptive:
            return self.planned if planned else self.sgd
        return self.adaptive if step.index >= self.settled else self.first


NOISE = NoiseLevels()


@dataclass(frozen=True, slots=True)
class NoisePart:
    """The noise part N = M_ms - M of a probe, at the rates it was measured at."""

    value: float
    error: float
    margin: float  # M, of the full batch
    levels: NoiseLevels = NOISE

    def counted(self, step: Observation) -> float:
        """Return N, or of methods that adapt before step `settled` what of it counts.

        That is min(N, first / first_margin M). v is a single squared gradient then: a fresh head on
        a pretrained net has an N of up to 190, at a margin of .2 and a good rate.
        """
        if not step.adaptive or step.index >= self.levels.settled:
            return self.value
        return min(self.value, self.levels.first / self.levels.first_margin * self.margin)

    def excess(self, step: Observation, *, growth: float = 1.0) -> float:
        """Return N over the level of a start, at `growth` times the rate: above 1 is too much."""
        return growth * self.counted(step) / self.levels.at(step, planned=growth > 1)

    def is_beyond(self, *, growth: float = 1.0) -> bool:
        """Tell whether M_ms is beyond its limit at `growth` times the rate, error bar and all."""
        lower = self.margin + self.value - self.levels.errors * self.error
        return growth * lower > self.levels.limit

    def factor(self, step: Observation, *, growth: float = 1.0) -> float:
        """Return what to multiply that rate by so that N is what good rates have.

        Or M, whichever asks less, where both have to be high (see `counted`).
        """
        levels = self.levels
        aimed = levels.aimed_adaptive if step.adaptive else levels.aimed
        asked = aimed / (growth * self.value)
        if step.adaptive and step.index < levels.settled:
            asked = max(asked, levels.aimed_margin / (growth * self.margin))
        return min(asked, 1.0)


def noise_part(step: Observation, levels: NoiseLevels = NOISE) -> NoisePart | None:
    """Return the noise part that this step's probe has measured; None if it could not, or not yet.

    Not where every step sees the same data: what differs within the batch is no noise there.
    """
    estimate = step.measured("stochastic_margin")
    whole, margin = value_of(estimate), step.margin_now if step.has_limit else None
    if estimate is None or whole is None or margin is None or margin <= 0 or step.same_data:
        return None
    noise, error = max(whole - margin, 0.0), estimate.error or 0.0
    return NoisePart(noise, error, margin, levels) if noise > error else None


def noise_ratio(estimates: Mapping[str, Estimate]) -> float | None:
    """Return the stochastic margin in units of the full-batch one, where a probe has had both."""
    whole = value_of(estimates.get("stochastic_margin"))
    margin = value_of(estimates.get("stability_margin"))
    return None if whole is None or not margin or margin <= 0 else max(whole / margin, 1.0)
