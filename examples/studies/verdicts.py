"""How a claim is decided: conditions that hold, fail, or stay open, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from studies.inference import Interval, Mean, number, ratio

HOLDS, FAILS, OPEN = "holds", "fails", "undecided"


@dataclass(frozen=True)
class Condition:
    """One thing that a claim needs, decided from the numbers."""

    verdict: str
    evidence: str


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, the criterion it is held to, and what came out."""

    section: str
    sentence: str
    criterion: str
    conditions: tuple[Condition, ...]

    @property
    def verdict(self) -> str:
        """One condition that fails makes a claim fail; all must hold for it to hold."""
        found = {condition.verdict for condition in self.conditions}
        if FAILS in found:
            return FAILS
        return HOLDS if found == {HOLDS} else OPEN

    @property
    def evidence(self) -> str:
        """What each condition came to."""
        return "; ".join(condition.evidence for condition in self.conditions)


def larger(what: str, a: Mean, b: Mean, *, least: float = 1.0) -> Condition:
    """Ask that a is more than `least` times b: the whole 95 % interval of their ratio."""
    found = ratio(a, b)
    if found is None:
        values = f"{a} against {b}"
        return Condition(OPEN, f"{what}: {values}, no ratio of positive numbers")
    return Condition(judged(found, least), f"{what}: {found} times")


def above(what: str, a: Mean, limit: float) -> Condition:
    """Ask that the 95 % interval of a mean lies above a limit."""
    interval = a.interval
    if interval is None or a.mean is None:
        return Condition(OPEN, f"{what}: {a}")
    found = Interval(a.mean, *interval)
    return Condition(judged(found, limit), f"{what}: {found}")


def below(what: str, a: Mean, limit: float) -> Condition:
    """Ask that the 95 % interval of a mean lies below a limit."""
    return opposite(above(what, a, limit))


def excludes_zero(what: str, found: Interval | None, *, positive: bool = True) -> Condition:
    """Ask that an interval lies on one side of zero."""
    if found is None:
        return Condition(OPEN, f"{what}: not to be had")
    condition = Condition(judged(found, 0.0), f"{what}: {found}")
    return condition if positive else opposite(condition)


def judged(found: Interval, limit: float) -> str:
    """Return whether an interval lies above a limit."""
    if found.low > limit:
        return HOLDS
    return FAILS if found.high <= limit else OPEN


def opposite(condition: Condition) -> Condition:
    """Return the condition that holds where this one fails."""
    swapped = {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}
    return Condition(swapped[condition.verdict], condition.evidence)


def known(what: str, values: Sequence[float], *, holds: bool) -> Condition:
    """A condition on numbers without an error, such as those of one net."""
    listed = ", ".join(number(v) for v in values)
    return Condition(HOLDS if holds else FAILS, f"{what}: {listed}")
