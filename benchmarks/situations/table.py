"""What a situation returns, and the list of all."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

KINDS = ("items", "couplings", "windows", "batches", "constants")


@dataclass(frozen=True, slots=True)
class Found:
    """What geomwatch says, what is right, and whether that agrees."""

    said: str
    reference: str
    right: bool


@dataclass(frozen=True, slots=True)
class Situation:
    """One of a kind, by what a user would call it."""

    kind: str
    name: str
    run: Callable[[], Found]


ALL: list[Situation] = []


def situation(name: str) -> Callable[[Callable[[], Found]], Callable[[], Found]]:
    """Put a function on the list of its module's kind."""

    def mark(run: Callable[[], Found]) -> Callable[[], Found]:
        ALL.append(Situation(run.__module__.rpartition(".")[2], name, run))
        return run

    return mark


def everything() -> list[Situation]:
    """Return all situations, kind by kind."""
    for kind in KINDS:
        importlib.import_module(f"situations.{kind}")
    return ALL
