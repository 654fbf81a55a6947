"""What of a slice is a parabola, and what is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geomwatch.curvature.checks import check_count
from geomwatch.errors import UsageError
from geomwatch.landscape.results import Floats, Slice

_ROUNDING = 8 * 2.0**-23  # of a loss in float32


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """A polynomial through the finite points of a slice, by least squares."""

    coefficients: Floats  # (degree + 1,), of 1, alpha, alpha^2, ...
    fitted: Floats  # (n,), at all points of the slice
    residual: Floats  # (n,), loss - fitted
    rms: float  # root mean square of the residual, in units of loss
    share: float  # rms over the range of the losses, 0 for a polynomial, about .3 for noise
    turns: int  # how often the slope changes its sign beyond rounding: 1 for a bowl


def polynomial_fit(result: Slice, *, degree: int = 2) -> Fit:
    """Fit a polynomial to a slice; for degree 2 the coefficients are L, v'g and v'Hv / 2.

    That is so where the slice is a parabola; otherwise they are those of the fit over its whole
    range. `turns` counts changes of slope larger than the rounding of float32.

    Raises:
        UsageError: there are not more finite points than coefficients.

    Example:
        >>> alphas = np.linspace(-1, 1, 5)
        >>> line = Slice(alphas, 2 + alphas + 3 * alphas**2, 2.0, "mine", 0, {})
        >>> polynomial_fit(line).coefficients.round(6).tolist()
        [2.0, 1.0, 3.0]
    """
    check_count("degree", degree, 1)
    finite = np.isfinite(result.losses)
    if finite.sum() <= degree + 1:
        raise UsageError(
            f"a fit of degree {degree} needs more than {degree + 1} finite points, "
            f"got {finite.sum()}. Take more alphas, or smaller ones."
        )
    scale = np.abs(result.alphas).max()
    powers = (result.alphas / scale)[:, None] ** np.arange(degree + 1)  # (n, degree + 1)
    solution = np.linalg.lstsq(powers[finite], result.losses[finite], rcond=None)[0]
    fitted = powers @ solution
    residual = result.losses - fitted
    rms = float(np.sqrt((residual[finite] ** 2).mean()))
    span = float(np.ptp(result.losses[finite]))
    return Fit(
        coefficients=solution / scale ** np.arange(degree + 1),
        fitted=fitted,
        residual=residual,
        rms=rms,
        share=rms / span if span > 0 else 0.0,
        turns=_turns(result.losses[finite]),
    )


def _turns(losses: Floats) -> int:
    """Count the turns of the path once steps that rounding could make are left out."""
    floor = _ROUNDING * np.abs(losses).max()
    kept = [losses[0]]
    for loss in losses[1:]:
        if abs(loss - kept[-1]) > floor:
            kept.append(loss)
    signs = np.sign(np.diff(kept))
    return int((signs[1:] != signs[:-1]).sum())
