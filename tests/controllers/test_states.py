"""The memory of controllers: it goes through a file, and what is damaged is refused whole."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from observations import random_run

from geomwatch.controllers import (
    BaseRateTest,
    BatchSizeScaler,
    CapLimits,
    GradientClipper,
    LearningRateCap,
    StallTest,
)
from geomwatch.controllers.conductor import Conductor
from geomwatch.errors import UsageError
from geomwatch.observation.documented import fields_of

KINDS = {
    "cap": LearningRateCap,
    "batch": BatchSizeScaler,
    "percentile": lambda: GradientClipper(rules=None),
    "z-score": lambda: GradientClipper(rules=None, policy="zscore"),
}


def ran(build, seed: int = 0) -> Any:
    controller = build()
    for step in random_run(seed):
        controller(step)
    return controller


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


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_entry_is_named_and_nothing_is_taken_over(kind):
    state = ran(KINDS[kind]).state_dict()
    fresh = KINDS[kind]()
    before = fresh.state_dict()
    tried = list(places(state))
    assert len(tried) >= 5
    for place in tried:
        # a dict is no entry of these states that a number, a list or a flag could be
        with pytest.raises(UsageError, match="the state of") as refused:
            fresh.load_state_dict(damaged(state, place, {"torn": object}))
        named = [key for key in place if isinstance(key, str)]
        assert named[-1] in str(refused.value)
        assert fresh.state_dict() == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_too_few_or_too_many_is_named(kind):
    state, fresh = ran(KINDS[kind]).state_dict(), KINDS[kind]()
    for name in state:
        less = {key: entry for key, entry in state.items() if key != name}
        with pytest.raises(UsageError, match=f"has no '{name}'"):
            fresh.load_state_dict(less)
    with pytest.raises(UsageError, match="has an unknown 'volume'"):
        fresh.load_state_dict({**state, "volume": 1})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_resumed_controller_moves_as_one_that_was_not_stopped(kind, seed):
    run = random_run(seed)
    whole, first, second = (KINDS[kind]() for _ in range(3))
    expected = [list(whole(step)) for step in run]
    begun = [list(first(step)) for step in run[:80]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()
    assert begun + [list(second(step)) for step in run[80:]] == expected


@pytest.mark.parametrize("saved", [[], [LearningRateCap()], [GradientClipper()]])
def test_a_conductor_refuses_the_state_of_other_controllers_before_it_takes_anything(saved):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    other = Conductor(saved, optimizer)
    other._settings = {"clip_norm": 2.0}
    conductor = Conductor([LearningRateCap(), GradientClipper()], optimizer)
    before = conductor.state_dict()
    with pytest.raises(UsageError, match=r"Conductor.controllers has no '(lr_scale|clip_norm)'"):
        conductor.load_state_dict(other.state_dict())
    with pytest.raises(UsageError, match=r"Conductor.controllers has an unknown|has no"):
        other.load_state_dict(before)
    assert conductor.state_dict() == before
    assert conductor.values((0.1,)) == {"lr_scale": 1.0, "clip_norm": float("inf")}


# Fields


@pytest.mark.parametrize(
    "kind",
    [LearningRateCap, CapLimits, StallTest, BaseRateTest, BatchSizeScaler, GradientClipper],
)
def test_each_field_says_what_it_is_and_where_a_number_comes_from(kind):
    fields = fields_of(kind)
    assert len(fields) <= 12
    for declared in fields:
        assert declared.kw_only
        assert declared.metadata["what"]
        assert f"    {declared.name}: " in kind.__doc__
        if type(declared.default) is float and declared.name != "min_norm":
            assert declared.metadata["source"]
