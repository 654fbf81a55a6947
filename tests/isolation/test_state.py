"""A memory that is declared: saved as primitives, taken over whole or not at all."""

from __future__ import annotations

import copy
import json
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from geomwatch.errors import UsageError
from geomwatch.isolation.state import Kept, Resumable
from geomwatch.records import Estimate


@dataclass(frozen=True)
class Pair:
    first: int
    second: float | None


class Inner(Resumable):
    count: Kept[int]

    def __init__(self) -> None:
        self.count = 0
        self.scratch = 0  # not declared, so not kept


class Outer(Resumable):
    rates: Kept[tuple[float, ...]]
    recent: Kept[deque[tuple[int, float]]]
    found: Kept[Estimate | None]
    pair: Kept[Pair]
    names: Kept[frozenset[str]]
    by_name: Kept[dict[str, float]]
    _far: Kept[float]
    inner: Kept[Inner]
    several: Kept[list[Inner]]
    rng: Kept[torch.Generator]

    def __init__(self) -> None:
        self.rates = ()
        self.recent = deque(maxlen=2)
        self.found = None
        self.pair = Pair(0, None)
        self.names = frozenset()
        self.by_name = {}
        self._far = math.inf
        self.inner = Inner()
        self.several = [Inner(), Inner()]
        self.rng = torch.Generator()
        self.told = 0

    def resumed(self) -> None:
        self.told += 1


def used() -> Outer:
    outer = Outer()
    outer.rates, outer.names = (0.1, 0.2), frozenset({"b", "a"})
    outer.recent.extend([(1, 0.5), (2, 0.25), (3, 0.1)])
    outer.found, outer.pair = Estimate(1.0, 0.5, "stderr"), Pair(2, 3.0)
    outer.by_name["x"] = 1.5
    outer.inner.count, outer.inner.scratch = 3, 9
    outer.several[1].count = 5
    outer.rng.manual_seed(7)
    return outer


def entries(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(state, dict):
        return [p for key, value in state.items() for p in entries(value, (*path, key))]
    if isinstance(state, list) and state:
        return [p for i, value in enumerate(state) for p in entries(value, (*path, i))]
    return [path]


def test_a_memory_comes_back_and_what_is_not_declared_stays() -> None:
    state, fresh = used().state_dict(), Outer()
    state["rng"] = state["rng"].tolist()
    state = json.loads(json.dumps(state))  # primitives all
    state["rng"] = torch.tensor(state["rng"], dtype=torch.uint8)
    fresh.load_state_dict(state)
    assert fresh.rates == (0.1, 0.2)
    assert fresh.recent == deque([(2, 0.25), (3, 0.1)])
    assert fresh.recent.maxlen == 2
    assert (fresh.found, fresh.pair) == (Estimate(1.0, 0.5, "stderr"), Pair(2, 3.0))
    assert (fresh.names, fresh.by_name, fresh._far) == ({"a", "b"}, {"x": 1.5}, math.inf)
    assert (fresh.inner.count, fresh.inner.scratch) == (3, 0)
    assert [inner.count for inner in fresh.several] == [0, 5]
    assert torch.equal(fresh.rng.get_state(), used().rng.get_state())
    assert fresh.told == 1


@pytest.mark.parametrize("path", [p for p in entries(used().state_dict()) if p != ("far",)])
def test_a_damaged_entry_is_named_and_nothing_is_changed(path: tuple[Any, ...]) -> None:
    state, fresh = copy.deepcopy(used().state_dict()), Outer()
    at = state
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = object()
    before = fresh.state_dict()
    with pytest.raises(UsageError, match="Nothing was changed") as said:
        fresh.load_state_dict(state)
    assert f"Outer.{path[0]}" in str(said.value)
    after = fresh.state_dict()
    assert torch.equal(after.pop("rng"), before.pop("rng"))
    assert after == before
    assert fresh.told == 0


@pytest.mark.parametrize("part", ["", "inner", "pair"])
def test_a_missing_and_an_unknown_entry_are_named(part: str) -> None:
    state = used().state_dict()
    at = state[part] if part else state
    gone = sorted(at)[0]
    at["surplus"] = at.pop(gone)
    with pytest.raises(UsageError, match=f"has no '{gone}' and an unknown 'surplus'"):
        Outer().load_state_dict(state)


def test_a_list_of_another_length_is_refused() -> None:
    state = used().state_dict()
    state["several"].pop()
    with pytest.raises(UsageError, match=r"Outer\.several must be a list of 2"):
        Outer().load_state_dict(state)


def test_a_users_own_part_is_loaded_by_itself() -> None:
    class Own:
        loaded: Any = None

        def state_dict(self) -> dict[str, int]:
            return {"n": 1}

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state

    class Holder(Resumable):
        parts: Kept[list[Any]]

        def __init__(self) -> None:
            self.parts = [Own()]

    holder = Holder()
    holder.load_state_dict(Holder().state_dict())
    assert holder.parts[0].loaded == {"n": 1}
