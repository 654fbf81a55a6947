"""A probe whose numbers can't be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from geomwatch.isolation.state import Kept
from geomwatch.observation.documented import GUESS, group, level, whole
from geomwatch.observation.step import Observation
from geomwatch.records import Alert, Severity
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule, Once, Persistence, soon_over


@dataclass(kw_only=True, eq=False, repr=False)
class UntrustedProbe(LatchedRule):
    """Says which numbers of probes can't be believed, and why, once that has lasted.

    A warning when the margin can't be believed (see `Observer`; `stability_margin` is silent then)
    or could not be had, for `persistence` steps. Information when its error exceeds `loose` of it
    and reaches beyond `matters`: the margin is a lower bound and may well be larger.
    """

    name = "untrusted_probe"
    reads = "probe"
    says = ("info", "warning")

    persistence: int = level(5, "steps that a doubt must last", source=GUESS, check=whole(0))
    loose: float = level(0.5, "share of the margin that its error may be", source=GUESS)
    matters: float = level(0.5, "margin, its error included, that matters", source=GUESS)
    once: Once = group(soon_over, "when an alert is news again")

    _doubtful: Kept[Persistence] = field(init=False)
    _absent: Kept[Persistence] = field(init=False)
    _loose: Kept[Persistence] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._doubtful, self._absent, self._loose = (
            Persistence(self.persistence) for _ in range(3)
        )

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe that was to measure the margin."""
        margin = step.margin
        if not step.fresh or margin is None or _is_left_to_others(step):
            return None
        absent = margin.value is None
        value, error = margin.value or 0.0, margin.error or 0.0
        loose = error > self.loose * abs(value) and abs(value) + error > self.matters
        doubtful = self._doubtful(bool(step.doubt), step.index)
        missing = self._absent(absent, step.index)
        inexact = self._loose(loose and not absent, step.index)
        found: tuple[Severity, str] | None = None
        if doubtful:
            found = "warning", _doubted(step.doubt)
        elif missing:
            found = "warning", _missed(margin.reason)
        elif inexact:
            found = "info", _bounded(value, error)
        elif not (step.doubt or absent or loose):
            self._latch.calm(step.index)
        if found is None or not self._latch.admit(found[0], step.index):
            return None
        return alert(self.name, *found, value=error, limit=abs(value), step=step.index)


def _is_left_to_others(step: Observation) -> bool:
    """Tell whether the gradient itself is not finite, which `non_finite` speaks of."""
    norm = None if step.present is None else step.present.grad_norm
    return norm is not None and not math.isfinite(norm)


def _doubted(why: str) -> str:
    return (
        f"the stability margin can't be believed: {why}. No warnings follow from it; loss and "
        "gradient norm are watched as before. `print(geomwatch.doctor(model, loss_fn, batch))` "
        'shows what is in the way; leave hvp at "auto", let loss_fn draw its random numbers from '
        "the global generators, and probe in float32."
    )


def _missed(why: str) -> str:
    return (
        f"probes have no stability margin: {why}. Nothing is warned of from "
        "curvature; loss and gradient norm are watched as before. "
        "`print(geomwatch.doctor(model, loss_fn, batch))` shows what is in the way."
    )


def _bounded(value: float, error: float) -> str:
    return (
        f"the stability margin is {value:.2g} ± {error:.2g}: a lower bound, and possibly far below "
        "the truth. Probes of a warm start have few products; a larger probe batch, or several "
        "probes more, sharpen it."
    )
