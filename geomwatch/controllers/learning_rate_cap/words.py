"""Why the rate is held where it is, in words."""

from __future__ import annotations

from collections.abc import Mapping

from geomwatch.observation.step import Observation

_AT = 0.99  # of what a limit allows: a cap from there on is held by that limit


def held(
    step: Observation,
    cap: float,
    *,
    at_start: float,
    shares: Mapping[str, tuple[float, float]],
    settled: float,
    is_setback: bool,
) -> str:
    """Say what holds a cap.

    Args:
        step: the coming one.
        cap: the largest rate that it is let take.
        at_start: the factor of the rate that a start allows.
        shares: each margin of the user's rate over its limit, and the limit, by what is measured.
        settled: what the loss has left of the limits.
        is_setback: a critical alert holds the rate down.
    """
    largest = max(step.lr)
    if cap >= largest:
        return f"the learning rate {largest:.3g} is within what the curvature allows"
    if cap > _AT * at_start * largest:
        return (
            f"learning rate {largest:.3g} held at {cap:.3g}: while the loss stands where it began, "
            "curvature, and how much batches disagree on it, has to be far below its limit"
        )
    what, (share, limit) = max(shares.items(), key=lambda item: item[1][0])
    bound = f"to stay below {limit:.3g}"
    if settled < 1:
        bound = f"{bound}, {1 / settled:.3g} x lower since the loss stopped falling or rose"
    if step.unseen:
        bound = f"{bound}; not raised while nothing is measured: {step.unseen}"
    elif is_setback:
        bound = f"{bound}; not raised until the loss is back where it was"
    elif share * cap < _AT * largest:
        bound = f"{bound}, approached in small steps"
    return (
        f"learning rate {largest:.3g} held at {cap:.3g}: times {what} it is {share * limit:.3g} of "
        f"what is stable ({bound})"
    )
