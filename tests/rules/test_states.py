"""The memory of rules: declared, carried through a file, and refused whole where it is damaged."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from observations import Watched, wild_run

from geomwatch.errors import UsageError
from geomwatch.observation.observer import Observer
from geomwatch.rules import DEFAULT

PARTS: list[Any] = [*DEFAULT, Observer]


def ran(kind: Any) -> Any:
    """A part that has seen some runs, so that it has something to remember."""
    part = kind()
    for seed in range(4):
        for step in wild_run(seed):
            part(step) if kind is Observer else part(Observer()(step))
    return part


def places(state: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to each entry of a state, of a long list to its first element alone."""
    inner = state.items() if isinstance(state, dict) else enumerate(state[:1])
    for key, value in inner:
        yield (*at, key)
        if isinstance(value, dict | list):
            yield from places(value, (*at, key))


def damaged(state: Any, place: tuple[Any, ...], entry: Any) -> Any:
    state = copy.deepcopy(state)
    *above, last = place
    part = state
    for key in above:
        part = part[key]
    part[last] = entry
    return state


@pytest.mark.parametrize("kind", PARTS)
def test_every_damaged_entry_is_named_and_nothing_is_taken_over(kind):
    state, fresh = ran(kind).state_dict(), kind()
    before = fresh.state_dict()
    tried = list(places(state))
    assert len(tried) >= 3
    for place in tried:
        for torn in ({"torn": object}, object()):
            with pytest.raises(UsageError, match="the state of") as refused:
                fresh.load_state_dict(damaged(state, place, torn))
            assert [key for key in place if isinstance(key, str)][-1] in str(refused.value)
            assert fresh.state_dict() == before


@pytest.mark.parametrize("kind", PARTS)
def test_an_entry_too_few_or_too_many_is_named(kind):
    state, fresh = ran(kind).state_dict(), kind()
    for name in state:
        less = {key: entry for key, entry in state.items() if key != name}
        with pytest.raises(UsageError, match=f"has no '{name}'"):
            fresh.load_state_dict(less)
    with pytest.raises(UsageError, match="has an unknown 'volume'"):
        fresh.load_state_dict({**state, "volume": 1})


@pytest.mark.parametrize("kind", DEFAULT)
@pytest.mark.parametrize("seed", range(8))
def test_a_resumed_rule_says_what_one_says_that_was_not_stopped(kind, seed):
    run = wild_run(seed)
    whole, first, second = (Watched(kind()) for _ in range(3))
    expected = [whole.all_of(step) for step in run]
    begun = [first.all_of(step) for step in run[:30]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert second.state_dict() == first.state_dict()
    assert begun + [second.all_of(step) for step in run[30:]] == expected
