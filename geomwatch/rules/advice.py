"""What an alert advises: a learning rate, and from where to go on. One answer for all rules.

A warning comes when a margin is beyond what healthy runs have, and a rate that is only just below
its level goes wrong again. So what is aimed for is not the level but where healthy runs live, by
each margin that this step knows. (A rate that is only planned, or just jumped to, is judged ahead:
those rules keep to the level of theirs.)
"""

from __future__ import annotations

from geomwatch.observation.levels import gradient_level
from geomwatch.observation.step import Observation

_MARGIN, _MARGIN_FULL_BATCH = 0.4, 0.8  # of the stability margin, aimed for
_GRADIENT, _GRADIENT_FULL_BATCH = 0.21, 0.6  # of the level of the gradient margin, aimed for
_AT_START = 3.0  # times that level, while the gradient lies along the sharpest directions
_YOUNG = range(1, 21)  # steps: to start again costs less than to find out what they have done
_AT_MOST, _AT_LEAST = 1 / 10, 1 / 30  # of the rate, where the loss says that it is too high


def rate_factor(
    step: Observation,
    *,
    margin: float | None = None,
    gradient: float | None = None,
    is_quiet: bool = False,
) -> float:
    """Return what to multiply the rate by, so that both margins are where healthy runs have them.

    min(0.4 / M, 0.21 level / G), at most 1, with M and G as the rule has them or as this step has
    measured them, whichever is larger; 0.8 and 0.6 where every step sees the same data, and three
    times as much of G in the first steps. 1 for optimizers without a formula: M and G are shares of
    no limit there. `is_quiet` as for the level.
    """
    if step.margin is not None and step.margin.status != "ok":
        return 1.0
    aimed = _MARGIN_FULL_BATCH if step.same_data else _MARGIN
    level = gradient_level(step, is_quiet=is_quiet)
    aimed_along = level * (_GRADIENT_FULL_BATCH if step.same_data else _GRADIENT)
    if step.index in _YOUNG:
        aimed_along *= _AT_START
    if step.fresh and step.margin is not None:
        margin = max(margin or 0.0, step.margin.value or 0.0)
    if step.gradient_fresh and step.gradient_margin is not None:
        gradient = max(gradient or 0.0, step.gradient_margin.value or 0.0)
    share = max((margin or 0.0) / aimed, (gradient or 0.0) / aimed_along)
    return 1.0 / max(share, 1.0)


def rate_factor_of_loss(
    step: Observation, *, margin: float | None, gradient: float | None
) -> float:
    """Return the same where the loss says that the rate is too high: 1/10 at most, 1/30 at least.

    The curvature where a loss has blown up says little about the rate to go on at.
    """
    factor = rate_factor(step, margin=margin, gradient=gradient)
    return min(max(factor, _AT_LEAST), _AT_MOST)


def advised_rate(step: Observation, factor: float) -> str:
    """Name the rate that is `factor` times that of this step."""
    return f"about {step.rate * factor:.1g} ({factor:.2g} x)"


def lower_rate(
    step: Observation, factor: float, *, is_lost: bool = False, is_late: bool = False
) -> str:
    """Say what rate to go down to; in the first steps, or if all `is_lost`, from where as well.

    What `is_late` is said after the step that was seen.
    """
    rate = advised_rate(step, factor)
    if step.index + is_late in _YOUNG:
        return f"Start again at a learning rate of {rate}"
    if is_lost:
        return f"Go back to an earlier checkpoint, or start again, at a learning rate of {rate}"
    return f"Lower the learning rate to {rate}"
