"""The study cut into pieces, in the order in which they need one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from studies.artefacts import false_ruggedness, repeated_eigenvalue
from studies.cases import Case, plain, variants
from studies.connecting import connect, pairs
from studies.measuring import measure
from studies.picturing import KINDS, picture
from studies.settings import STAGES, Settings
from studies.store import Store
from studies.training import train


@dataclass(frozen=True)
class Piece:
    """One thing to compute, kept under its name."""

    name: str
    compute: Callable[[], Any]


def pieces(store: Store, settings: Settings) -> Iterator[Piece]:
    """Yield the pieces of the study: all numbers first, then what is drawn."""
    for case in [*plain(settings), *variants(settings)]:
        yield from _numbers(store, case, settings)
    for case in plain(settings):
        for kind in KINDS:
            drawn = partial(picture, store, case, kind, settings)
            yield Piece(f"{case.name}/pictures/{kind}", drawn)
        for name, look in (("power", repeated_eigenvalue), ("rugged", false_ruggedness)):
            yield kept(store, f"{case.name}/{name}", look, case, settings)


def _numbers(store: Store, case: Case, settings: Settings) -> Iterator[Piece]:
    for seed in settings.seeds:
        yield kept(store, f"{case.name}/seed{seed}-run", train, case, seed, settings)
        for stage in stages(case):
            name = f"{case.name}/seed{seed}-{stage}-geometry"
            yield kept(store, name, measure, case, seed, stage, settings)
    for pair in pairs(settings):
        for stage in stages(case):
            name = f"{case.name}/pair{pair[0]}{pair[1]}-{stage}-barrier"
            yield kept(store, name, connect, case, pair, stage, settings)


def stages(case: Case) -> tuple[str, ...]:
    """Return the stages at which a case is looked at: variants not at the start."""
    return STAGES[1:] if case.variant else STAGES


def kept(store: Store, name: str, compute: Callable[..., Any], *arguments: Any) -> Piece:
    """Return a piece whose facts are kept."""
    return Piece(name, lambda: store.facts(name, partial(compute, store, *arguments)))
