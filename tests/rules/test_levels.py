"""The levels of rules: what each says of itself, what it refuses, and that it decides something."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from observations import wild_run

from geomwatch.errors import UsageError
from geomwatch.monitoring.dispatch import is_due
from geomwatch.observation.documented import fields_of, rows_of
from geomwatch.observation.observer import Observer
from geomwatch.rules import DEFAULT, GradientMargin, Observation, Once, StabilityMargin

PARTS: list[Any] = [*DEFAULT, Observer]
LEVELS = [(kind, name) for kind in PARTS for name, _, _ in rows_of(kind)]
each_level = pytest.mark.parametrize(
    ("kind", "name"), LEVELS, ids=[f"{kind.__name__}.{name}" for kind, name in LEVELS]
)


def changed(kind: Any, path: str, value: Any) -> dict[str, Any]:
    """The argument that gives a level another value, alone or within its group."""
    name, _, inner = path.partition(".")
    return {name: dataclasses.replace(getattr(kind, name), **{inner: value}) if inner else value}


def default_of(kind: Any, path: str) -> Any:
    return next(value for name, value, _ in rows_of(kind) if name == path)


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_takes_twelve_arguments_at_most_and_each_is_documented(kind):
    arguments = inspect.signature(kind).parameters
    assert len(arguments) <= 12
    assert set(arguments) == {field.name for field in fields_of(kind)}
    own = [name for name in arguments if name in inspect.get_annotations(kind)]
    assert [name for name in own if f"    {name}: " not in kind.__doc__] == []


@each_level
def test_a_level_says_what_it_is_and_what_stands_behind_it(kind, name):
    (told,) = (field.metadata for path, _, field in rows_of(kind) if path == name)
    assert re.match(r"[a-z]|N |M_ms ", told["what"])
    assert not told["what"].endswith(".")
    assert told["source"]


@each_level
def test_what_can_be_no_level_is_refused_by_its_name(kind, name):
    for wrong in (-1, math.nan, "0.5", None, True):
        with pytest.raises(UsageError, match=rf"{name.rpartition('.')[2]} must be .*, got "):
            kind(**changed(kind, name, wrong))


def test_a_group_of_another_kind_is_refused():
    with pytest.raises(UsageError, match=r"advice must be a Advice, got .* Pass advice=Advice"):
        StabilityMargin(advice=Once())
    with pytest.raises(UsageError, match="levels must be a GradientLevels, got 9"):
        GradientMargin(levels=9)


# Each one decides something


def owner_of(kind: Any, path: str) -> Any:
    """The part itself or, of a level in a group, the group: several rules may share one."""
    name, _, inner = path.partition(".")
    return type(getattr(kind, name)) if inner else kind


SHARED: dict[tuple[Any, str], list[tuple[Any, str]]] = {}
for _kind, _name in LEVELS:
    SHARED.setdefault((owner_of(_kind, _name), _name.rpartition(".")[2]), []).append((_kind, _name))


@functools.cache
def seen(seed: int) -> list[Observation]:
    observer = Observer()
    return [observer(step) for step in wild_run(seed)]


def told(part: Any, seed: int) -> list[Any]:
    """What a rule says in a run, or what an observer knows of it."""
    if isinstance(part, Observer):
        return [part(step) for step in wild_run(seed)]
    return [part(step) if is_due(part, step) else None for step in seen(seed)]


@functools.cache
def usually(kind: Any, seed: int) -> list[Any]:
    return told(kind(), seed)


def others(kind: Any, name: str) -> Iterator[dict[str, Any]]:
    """Arguments that give a level another value, as far as it may have it."""
    default = default_of(kind, name)
    for value in (default * 2, default / 2, default + 40, default + 0.3, default / 8, default * 9):
        try:
            other = changed(kind, name, type(default)(value))
            kind(**other)
        except UsageError:
            continue
        yield other


def decides(kind: Any, name: str) -> bool:
    return any(
        told(kind(**other), seed) != usually(kind, seed)
        for other in others(kind, name)
        for seed in range(160)
    )


@pytest.mark.parametrize(
    "uses", SHARED.values(), ids=[f"{owner.__name__}.{name}" for owner, name in SHARED]
)
def test_with_another_level_something_else_is_said(uses):
    assert any(decides(*use) for use in uses)
