"""What an alert advises: a learning rate, and from where to go on. One answer for all rules."""

from __future__ import annotations

from dataclasses import dataclass

from geomwatch.observation.documented import Documented, level
from geomwatch.observation.gradient_level import GRADIENT, GradientLevels
from geomwatch.observation.step import Observation


@dataclass(frozen=True, kw_only=True, repr=False)
class Advice(Documented):
    """Where healthy runs live, by each margin that a step knows.

    A warning comes when a margin is beyond what healthy runs have, and a rate that is only just
    below its level goes wrong again: so what is aimed for is not the level. (A rate that is only
    planned, or just jumped to, is judged ahead: those rules keep to the level of theirs.)
    """

    margin: float = level(0.4, "stability margin aimed for", source="decision 017")
    margin_full_batch: float = level(0.8, "the same in full-batch training", source="decision 017")
    gradient: float = level(
        0.21, "gradient margin aimed for, as a share of its level", source="decision 017"
    )
    gradient_full_batch: float = level(
        0.6, "the same in full-batch training", source="decision 017"
    )
    start: float = level(
        3.0,
        "times as much of it in the first steps, along sharp directions",
        source="decision 017",
    )
    young: int = level(20, "last step at which it costs less to start again", source="decision 017")

    def factor(
        self,
        step: Observation,
        *,
        margin: float | None = None,
        gradient: float | None = None,
        levels: GradientLevels = GRADIENT,
        is_quiet: bool = False,
    ) -> float:
        """Return what to multiply the rate by, so that margins are where healthy runs have them.

        min(`margin` / M, `gradient` level / G), at most 1, with M and G as the rule has them or as
        this step has measured them, whichever is larger. 1 for optimizers without a formula: M and
        G are shares of no limit there. `levels` and `is_quiet` are those of the level of G.
        """
        if not step.has_limit:
            return 1.0
        aimed = self.margin_full_batch if step.same_data else self.margin
        aimed_along = levels.at(step, is_quiet=is_quiet)
        aimed_along *= self.gradient_full_batch if step.same_data else self.gradient
        if self._is_young(step.index):
            aimed_along *= self.start
        margin = max(margin or 0.0, step.margin_now or 0.0)
        gradient = max(gradient or 0.0, step.gradient_margin_now or 0.0)
        return 1.0 / max(margin / aimed, gradient / aimed_along, 1.0)

    def lower_rate(
        self, step: Observation, factor: float, *, is_lost: bool = False, is_late: bool = False
    ) -> str:
        """Say what rate to go down to; in the first steps, or if all `is_lost`, from where as well.

        What `is_late` is said after the step that was seen.
        """
        rate = advised_rate(step, factor)
        if self._is_young(step.index + is_late):
            return f"Start again at a learning rate of {rate} instead of {step.rate:.3g}"
        if is_lost:
            return f"Go back to an earlier checkpoint, or start again, at a learning rate of {rate}"
        return f"Lower the learning rate from {step.rate:.3g} to {rate}"

    def _is_young(self, index: int) -> bool:
        return 0 < index <= self.young


@dataclass(frozen=True, kw_only=True, repr=False)
class LossAdvice(Advice):
    """The same where the loss says that the rate is too high, which bounds the answer."""

    most: float = level(
        1 / 10, "share of the rate, at most, for a risen loss", source="decision 017"
    )
    least: float = level(1 / 30, "share of the rate, at least, there", source="decision 017")

    def factor_of_loss(
        self, step: Observation, *, margin: float | None, gradient: float | None
    ) -> float:
        """Return the same where the loss says that the rate is too high: within bounds.

        The curvature where a loss has blown up says little about the rate to go on at.
        """
        factor = self.factor(step, margin=margin, gradient=gradient)
        return min(max(factor, self.least), self.most)


def advised_rate(step: Observation, factor: float) -> str:
    """Name the rate that is `factor` times that of this step."""
    return f"about {step.rate * factor:.2g} ({factor:.2g} x)"
