"""Fields that declare what they are: what help, pages and error messages make of them."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from geomwatch.errors import UsageError
from geomwatch.observation.documented import (
    GUESS,
    Documented,
    above,
    at_least,
    between,
    group,
    level,
    option,
    table_of,
    whole,
)

TOOL = Path(__file__).parents[2] / "tools" / "write_fields.py"


@dataclass(frozen=True, kw_only=True, repr=False)
class Span(Documented):
    """How long."""

    steps: int = level(20, "steps without an alert", source="decision 005", check=whole(1))


@dataclass(kw_only=True, eq=False, repr=False)
class Calm(Documented):
    """Waits for calm.

    And says so.

    Raises:
        UsageError: a number outside its range.
    """

    share: float = level(0.5, "of its limit", source=GUESS, check=between(0, 1))
    limit: float | None = level(None, "of the margin", source="theory", check=above(0))
    least: float = level(0.0, "margin", source="theory", check=at_least(0))
    span: Span = group(Span, "how long it waits")
    loud: bool = option(False, "say it twice")


def test_the_fields_are_in_the_docstring_with_their_sources():
    assert Calm.__doc__ is not None
    assert Calm.__doc__.startswith("Waits for calm.\n\nAnd says so.\n\nArgs:\n    share: of its")
    assert "    share: of its limit (no run or table behind it: a guess)." in Calm.__doc__
    assert Calm.__doc__.endswith(
        "    loud: say it twice.\n\nRaises:\n    UsageError: a number outside its range."
    )


def test_a_table_has_a_row_for_each_field_and_each_of_a_group():
    rows = table_of(Calm).splitlines()[2:]
    names = [row.split("`")[1] for row in rows]
    assert names == ["share", "limit", "least", "loud", "span.steps"]
    assert rows[4] == "| `span.steps` | `20` | steps without an alert (decision 005) |"


def test_only_what_differs_from_the_defaults_is_shown():
    assert repr(Calm()) == "Calm()"
    assert repr(Calm(share=0.25, span=Span(steps=3))) == "Calm(share=0.25, span=Span(steps=3))"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1}, "share must be a number between 0 and 1, got 1"),
        ({"share": None}, "share must be a number between 0 and 1, got None"),
        ({"limit": 0}, "limit must be a number above 0, got 0"),
        ({"limit": math.inf}, "limit must be a number above 0, got inf"),
        ({"least": -1}, "least must be a number at least 0, got -1"),
        ({"least": True}, "least must be a number at least 0, got True"),
        ({"span": 20}, r"span must be a Span, got 20. Pass span=Span\(...\)."),
    ],
)
def test_what_a_field_cannot_be_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Calm(**options)


@pytest.mark.parametrize("steps", [0, 2.5, "8", True])
def test_a_count_that_is_none_is_refused(steps):
    with pytest.raises(UsageError, match="steps must be an integer >= 1, got"):
        Span(steps=steps)


def test_none_passes_where_it_is_the_default():
    assert Calm(limit=None).limit is None


def test_the_tables_of_all_pages_are_those_of_the_fields():
    spec = importlib.util.spec_from_file_location("write_fields", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    stale = [page.name for page in tool.pages() if tool.written(page) != page.read_text("utf-8")]
    assert not stale, f"run python tools/write_fields.py: {stale}"
