"""The critical learning rate: how far along the coming step the loss comes back to its value."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from geomwatch.estimators.noise_floor import LossAt, Readout
from geomwatch.records import Estimate

_MOST_DOUBLINGS = 30


def critical_lr(
    loss_at: LossAt,
    direction: Tensor,
    readout: Readout,
    *,
    slope: float,
    start: float,
    bisections: int = 5,
) -> Estimate:
    """Return eta_c with L(w - eta_c d) = L(w): beyond it a step along -d raises the loss.

    In the unit of the learning rate whose step is -eta d. On a parabola eta_c = 2 g'd / d'Hd, so
    2 / eta_c is a directional sharpness for the price of forward passes ("critical sharpness",
    Kalra et al. 2026, after Kalra and Barkeshli 2024). Doubles or halves from `start` until the
    crossing is enclosed, then bisects: the value is the middle of the last interval, the error
    its half width (1 % after 5 bisections) or what the noise floor of the loss hides. Where the
    slice crosses several times it is one of the crossings. Costs `bisections` + 1 + about log2 of
    start's distance forward passes, 6 to 10, no HVPs.

    Withheld where two evaluations of the same point differ beyond rounding, where -d does not
    descend, where no crossing is found, and where the loss dips by less than its noise floor.

    Args:
        direction: (D,) d.
        slope: g'd, the loss's first descent along -d.
        start: a first guess of eta_c, such as the present learning rate.
    """
    if readout.reason:
        return Estimate(None, status="withheld", reason=readout.reason)
    if not slope > 0:
        reason = f"the step is not a descent direction (slope g'd = {slope:.3g})"
        return Estimate(None, status="withheld", reason=reason)

    def rises(eta: float) -> bool:
        """Also where the loss is not finite."""
        return not loss_at(-eta * direction) <= readout.loss + readout.floor

    low, high = _enclosed(rises, start)
    if low is None or high is None:
        way = f"falls or stays up to {low:.2g}" if low else f"rises from {high:.2g} on"
        reason = f"no crossing found: along the step the loss {way}"
        return Estimate(None, status="withheld", reason=reason)
    for _ in range(bisections):
        middle = (low + high) / 2
        low, high = (low, middle) if rises(middle) else (middle, high)
    value = (low + high) / 2
    if slope * value / 4 <= readout.floor:  # how deep a parabola dips in between
        reason = f"the dip of the loss is below its noise floor ({readout.floor:.2g})"
        return Estimate(None, status="withheld", reason=reason)
    # Where a parabola comes back to L(w) it rises as steeply as it fell at the start.
    error = max((high - low) / 2, readout.floor / slope)
    return Estimate(value, error, "residual", reason="the crossing is within the error")


def _enclosed(rises: Callable[[float], bool], start: float) -> tuple[float | None, float | None]:
    """The last rate that does not raise the loss and the first that does, a factor 2 apart."""
    up = rises(start)
    eta = start
    for _ in range(_MOST_DOUBLINGS):
        following = eta / 2 if up else eta * 2
        if rises(following) != up:
            return (following, eta) if up else (eta, following)
        eta = following
    return (None, eta) if up else (eta, None)
