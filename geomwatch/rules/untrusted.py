"""A probe whose numbers can't be believed."""

from __future__ import annotations

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.observation.step import Observation
from geomwatch.observation.trust import Trust
from geomwatch.records import Alert, Severity
from geomwatch.rules.message import alert
from geomwatch.rules.rule import Latch, Persistence

_LASTING = 5  # steps that a doubt must last
_LOOSE = 0.5  # of the margin, that its error may be,
_MATTERS = 0.5  # where the margin may be as large as this


class UntrustedProbe(Resumable):
    """Says which numbers of probes can't be believed, and why, once that has lasted for 5 steps.

    A warning when the margin can't be believed (see `trust`; `stability_margin` is silent then) or
    could not be had. Information when its error exceeds half of it and reaches beyond 0.5: the
    margin is a lower bound and may well be larger.
    """

    name = "untrusted_probe"

    _trust: Kept[Trust]
    _doubtful: Kept[Persistence]
    _absent: Kept[Persistence]
    _loose: Kept[Persistence]
    _latch: Kept[Latch]

    def __init__(self) -> None:
        self._trust = Trust()
        self._doubtful = Persistence(_LASTING)
        self._absent = Persistence(_LASTING)
        self._loose = Persistence(_LASTING)
        self._latch = Latch(release=1, cooldown=0)

    def __call__(self, step: Observation) -> Alert | None:
        """Judge a probe that was to measure the margin."""
        doubt = self._trust(step)
        margin = step.margin
        if not step.fresh or margin is None:
            return None
        absent = margin.value is None
        value, error = margin.value or 0.0, margin.error or 0.0
        loose = error > _LOOSE * abs(value) and abs(value) + error > _MATTERS
        doubtful = self._doubtful(bool(doubt), step.index)
        missing = self._absent(absent, step.index)
        inexact = self._loose(loose and not absent, step.index)
        if doubtful:
            return self._tell(step, "warning", _doubted(doubt))
        if missing:
            return self._tell(step, "warning", _missed(margin.reason))
        if inexact:
            return self._tell(step, "info", _bounded(value, error))
        if not (doubt or absent or loose):
            self._latch.calm(step.index)
        return None

    def _tell(self, step: Observation, severity: Severity, text: str) -> Alert | None:
        if not self._latch.admit(severity, step.index):
            return None
        margin = step.margin
        value = 0.0 if margin is None or margin.value is None else margin.value
        error = 0.0 if margin is None or margin.error is None else margin.error
        return alert(self.name, severity, text, value=error, limit=abs(value), step=step.index)


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
        "the truth. Probes of a warm start have few products; a larger probe_batch, or several "
        "probes more, sharpen it."
    )
