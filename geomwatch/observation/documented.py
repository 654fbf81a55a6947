"""Levels as fields: each says what it is, what it may be, and what stands behind its number."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from geomwatch.errors import UsageError

GUESS = "no run or table behind it: a guess"  # the source of a level that nobody has tried

Check = Callable[[str, Any], None]  # of a field's name and value: refuses what can't be one


def level(default: Any, what: str, *, source: str, check: Check | None = None) -> Any:
    """Declare a level, a span or a count: a field of a `Documented` dataclass.

    Args:
        what: it is, with its unit; begins in lower case and ends without a full stop.
        source: where the default comes from: theory, a citation, "decision 013", or `GUESS`.
        check: refuses values that can't work; by default what is not above 0, or no integer where
            the default is one. None passes where it is the default.
    """
    if check is None and isinstance(default, int | float | None):
        check = whole(1) if isinstance(default, int) else above(0)
    return _declared(default, what, source, check)


def option(default: Any, what: str, *, check: Check | None = None) -> Any:
    """Declare a field that is the user's choice and no number to be justified."""
    return _declared(default, what, "", check)


def group(kind: Callable[[], Any], what: str) -> Any:
    """Declare a field that holds several levels: a frozen `Documented`, by default as it is."""
    return _declared(kind(), what, "", None)


def _declared(default: Any, what: str, source: str, check: Check | None) -> Any:
    metadata = {"what": what, "source": source, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


class Documented:
    """A dataclass whose fields are declared by `level` and `option`, and checked as they say.

    The fields become the `Args:` of its docstring and the table of its page, so that neither can
    say what the code does not do. What one remembers beside them takes no argument:

        @dataclass(kw_only=True, eq=False, repr=False)
        class Calm(Documented, Resumable):
            "Waits for calm."
            steps: int = level(20, "without an alert", source="decision 005", check=whole(1))
            _since: Kept[int | None] = field(init=False, default=None)
    """

    def __init_subclass__(cls) -> None:
        """Write the declared fields into the docstring."""
        super().__init_subclass__()
        own = [(n, f) for n, f in vars(cls).items() if isinstance(f, dataclasses.Field)]
        kinds = [kind for kind in cls.__bases__ if dataclasses.is_dataclass(kind)]
        inherited = [(f.name, f) for kind in kinds for f in fields_of(kind)]
        every = {**dict(own), **{n: f for n, f in inherited if n not in vars(cls)}}
        lines = [_argument(name, f) for name, f in every.items() if "what" in f.metadata]
        if lines:
            text, mark, raises = inspect.cleandoc(cls.__doc__ or "").partition("\n\nRaises:\n")
            cls.__doc__ = "\n".join([text, "", "Args:", *lines]) + mark + raises

    def __post_init__(self) -> None:
        for declared in fields_of(type(self)):
            _check(declared, getattr(self, declared.name))

    def __repr__(self) -> str:
        """Show the fields that differ from their defaults."""
        named = [(f.name, getattr(self, f.name), f.default) for f in fields_of(type(self))]
        changed = [f"{name}={value!r}" for name, value, default in named if value != default]
        return f"{type(self).__name__}({', '.join(changed)})"


def fields_of(kind: type) -> list[dataclasses.Field[Any]]:
    """Return the declared fields of a `Documented` dataclass."""
    return [f for f in dataclasses.fields(kind) if "what" in f.metadata]


def table_of(kind: object) -> str:
    """Return a Markdown table of the fields, those of a group under the group's name."""
    rows = [f"| `{n}` | `{_shown(value)}` | {_what(f)} |" for n, value, f in _groups_last(kind)]
    return "\n".join(
        [
            "| field | default | what it is, and where the default comes from |",
            "|---|---|---|",
            *rows,
        ]
    )


def _groups_last(part: object) -> list[tuple[str, Any, dataclasses.Field[Any]]]:
    return sorted(rows_of(part), key=lambda row: "." in row[0])


def rows_of(part: object, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """List name, value and field of all that is declared; of a class the defaults."""
    for declared in fields_of(part if isinstance(part, type) else type(part)):
        name, value = prefix + declared.name, getattr(part, declared.name)
        if isinstance(value, Documented):
            yield from rows_of(value, f"{name}.")
        else:
            yield name, value, declared


def _shown(default: Any) -> str:
    return f"{default:.3g}" if isinstance(default, float) else repr(default)


def _what(declared: dataclasses.Field[Any]) -> str:
    what, source = declared.metadata["what"], declared.metadata["source"]
    return f"{what} ({source})" if source else what


def _argument(name: str, declared: dataclasses.Field[Any]) -> str:
    text = f"{name}: {_what(declared)}."
    return textwrap.fill(text, 96, initial_indent="    ", subsequent_indent=" " * 8)


def _check(declared: dataclasses.Field[Any], value: Any) -> None:
    name, default, check = declared.name, declared.default, declared.metadata["check"]
    if isinstance(default, Documented) and not isinstance(value, type(default)):
        group = type(default).__name__
        raise UsageError(f"{name} must be a {group}, got {value!r}. Pass {name}={group}(...).")
    if check is not None and not (value is None and default is None):
        check(name, value)


def above(least: float) -> Check:
    """Return what refuses all but finite numbers above `least`."""
    return _numbers(lambda value: value > least, f"a number above {least:g}")


def at_least(least: float) -> Check:
    """Return what refuses all but finite numbers from `least` on."""
    return _numbers(lambda value: value >= least, f"a number at least {least:g}")


def between(low: float, high: float, *, last: bool = False) -> Check:
    """Return what refuses all but numbers between these; of the two at most the `last` may be."""
    wanted = f"a number between {low:g} and {high:g}"
    return _numbers(lambda value: low < value < high or (last and value == high), wanted)


def whole(least: int) -> Check:
    """Return what refuses all but whole numbers from `least` on."""
    return _numbers(lambda value: value >= least, f"an integer >= {least}", int)


def _numbers(fits: Callable[[Any], bool], wanted: str, kinds: Any = int | float) -> Check:
    def check(name: str, value: Any) -> None:
        known = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if not known or not fits(value):
            raise UsageError(f"{name} must be {wanted}, got {value!r}.")

    return check
