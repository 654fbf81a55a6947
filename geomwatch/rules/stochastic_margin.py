"""A start whose batches disagree so much that steps of this size cannot average out."""

from __future__ import annotations

from typing import Any

from geomwatch.records import Alert
from geomwatch.rules.advice import lower_rate, rate_factor
from geomwatch.rules.levels import items_of
from geomwatch.rules.message import alert, batch_advice, carried_by
from geomwatch.rules.observation import Latch, Observation, load_into, state_of
from geomwatch.rules.regime import noise_of
from geomwatch.rules.trust import Trust
from geomwatch.sinks import format_estimate

_LEVEL = 4.0  # of the mean-square margin
_YOUNG = range(2, 20)  # steps
_AIMED = 1.0  # the mean-square margin that the advice aims for


class StochasticMargin:
    """Warns when the mean-square margin of one of the first steps is above 4.

    M_ms < 1 is stability of the mean square of steps along the sharpest direction, where curvature
    differs between batches (see `estimators.mean_square`). It is measured in the first steps where
    these look suspicious (see `SecondLook`). Trainings at their tuned rates have .06 to .9 there,
    at four times that up to 3.4, while noise still grows; later they settle near 1, and what a
    value tells is left to `gradient_margin`, which goes by how much of it is noise.
    """

    name = "stochastic_margin"

    def __init__(self) -> None:
        self._latch = Latch()
        self._trust = Trust()

    def __call__(self, seen: Observation) -> Alert | None:
        """Judge a probe of the first steps that has measured micro-batches."""
        doubt = self._trust(seen)
        found = (seen.estimates or {}).get("stochastic_margin")
        if doubt or seen.step not in _YOUNG or seen.deterministic or not seen.fresh:
            return None
        if found is None or found.status != "ok" or found.value is None:
            return None
        if seen.margin is None or seen.margin.status != "ok" or seen.margin.value is None:
            return None
        if found.value <= _LEVEL or not self._latch.admit("warning", seen.step):
            return None
        factor = min(rate_factor(seen), _AIMED / found.value)
        text = (
            f"batches of {items_of(seen)} disagree too much for a learning rate of "
            f"{max(seen.lr):.3g} with {seen.optimizer}: mean-square margin {format_estimate(found)}"
            f" (alert above {_LEVEL:g} in the first {_YOUNG.stop} steps, unstable at 1; the full "
            f"batch has {format_estimate(seen.margin)}){carried_by(seen)}. "
            f"{lower_rate(seen, factor)}, or with a warm-up."
        ) + batch_advice(seen.margin.value, noise_of(seen.estimates or {}))
        return alert(
            self.name,
            "warning",
            text,
            value=found.value,
            limit=_LEVEL,
            step=seen.step,
            layers=seen.layers,
        )

    @property
    def _parts(self) -> dict[str, Any]:
        return {"latch": self._latch, "trust": self._trust}

    def state_dict(self) -> dict[str, Any]:
        """Return the latch, and whether the loss is a function of the weights."""
        return state_of(self._parts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them over."""
        load_into(self._parts, state)
