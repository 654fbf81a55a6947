"""The watch between probes: curvature along the coming step, from forward passes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from geomwatch.estimators.noise_floor import LossAt
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.records import Estimate
from geomwatch.stability.scaled import Stability

_BEND = 1e-3  # of the loss: what the step is chosen to change by curvature
_DROP = 0.1  # of the loss: the most it may change by the slope
_PLAUSIBLE = 4.0  # times the last value; beyond, the slope is doubted
_LARGEST = 1e3  # gain that losses are believed to tell
_ERROR = 0.05  # relative: what measured values deviate from exact ones by


@dataclass(frozen=True, slots=True)
class Point:
    """The coming step as a sentinel sees it: its direction, and what is known of it for free."""

    stability: Stability
    gradient: Tensor  # (D,) that the step will use
    is_own: bool = False  # the gradient is that of the loss which a replay evaluates, to rounding
    loss: float | None = None  # L(w), where it is known
    gain: float | None = 1.0  # of the step on the loss's gradient; None to find it from losses


class Sentinel(Resumable):
    """Measures the small-batch margin m = r d'(H + W)d / g'd along d = S^2 g (see `stability`).

    From one forward pass, two where the loss is not known, if a replay is known to have the
    gradient of the step itself, as without dropout and clipping:

        d'Hd = 2 (L(w - h d) - L(w) + h g'd) / h^2,

    else from three, d'Hd = (L(w + h d) - 2 L(w) + L(w - h d)) / h^2; h such that curvature changes
    the loss by 0.1 %. Against exact products the first is off by 1 to 4 %, with ReLUs too. No
    second derivative is needed, so it works under fused attention. Signed.

    A value of the first kind more than four times the last one is measured again by the second.
    """

    _margin: Kept[float | None]  # d'Hd / g'd of the last measurement

    def __init__(self) -> None:
        self._margin = None
        self._slope = 0.0  # of the loss along the step

    def note(self, margin: float | None) -> None:
        """Take note of d'(H + W)d / g'd as a probe has measured it."""
        if margin is not None and math.isfinite(margin):
            self._margin = margin

    def measure(self, loss_at: LossAt, point: Point) -> Estimate:
        """Return m; withheld where the gradient is zero or losses are not finite."""
        d = point.stability.step_along(point.gradient)
        slope = float(point.gradient @ d)
        if not 0 < slope < math.inf:
            return Estimate(None, status="withheld", reason="the gradient is zero or not finite")
        found, self._slope = self._by_one(loss_at, point, d, slope), slope
        if found is None:
            found = self._by_three(loss_at, d, slope)
        if found is None:
            return Estimate(None, status="withheld", reason="the loss next to the weights is not")
        self._margin = found
        if point.stability.decay is not None:
            found += float(d @ (point.stability.decay * d)) / slope
        # the loss falls along the step as its own gradient has it, whatever the step makes of that
        gain = point.gain if point.gain is not None else slope / max(self._slope, slope / _LARGEST)
        margin = gain * point.stability.limit_ratio * found
        reason = "by differences of losses"
        return Estimate(margin, _ERROR * abs(margin), "residual", reason=reason)

    def _by_one(self, loss_at: LossAt, point: Point, d: Tensor, slope: float) -> float | None:
        """Return d'Hd / g'd where loss and slope are known, if it is plausible."""
        if not point.is_own or self._margin is None:
            return None
        here = loss_at(0 * d) if point.loss is None else point.loss
        h = self._distance(here, slope)
        bend = loss_at(-h * d) - here + h * slope
        found = 2 * bend / (h * h * slope)
        near = abs(self._margin) + 2 * _BEND * abs(here) / (h * h * slope)
        return found if abs(found) <= _PLAUSIBLE * near else None

    def _by_three(self, loss_at: LossAt, d: Tensor, slope: float) -> float | None:
        here = loss_at(0 * d)
        for _ in range(2):
            h = self._distance(here, slope)
            ahead, behind = loss_at(h * d), loss_at(-h * d)
            bend, self._slope = ahead + behind - 2 * here, (ahead - behind) / (2 * h)
            if not math.isfinite(bend):
                return None
            before, self._margin = self._margin, bend / (h * h * slope)
            # from a guess that was far off, once more
            if before is not None and abs(self._margin) < 30 * abs(before):
                break
        return self._margin

    def _distance(self, loss: float, slope: float) -> float:
        """Return h, at which curvature changes the loss by its share."""
        most = _DROP * max(abs(loss), 1e-12) / slope
        if not self._margin:
            return 0.3 * most
        return min(math.sqrt(2 * _BEND * abs(loss) / (abs(self._margin) * slope)), most)
