"""What survives a resume: declared beside the attribute, saved and loaded by one pair for all."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import (
    Annotated,
    Any,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import torch

from geomwatch.errors import UsageError

T = TypeVar("T")
_MARK = object()
Kept = Annotated[T, _MARK]  # marks an attribute of a Resumable, in its class, as its memory

_Assign = Callable[[], object]
_PLAIN: dict[type, tuple[type, ...]] = {
    float: (float, int),
    int: (int,),
    str: (str,),
    bool: (bool,),
}
_SEQUENCES = (tuple, list, deque, set, frozenset)


class Resumable:
    """Has a memory: the attributes that its class annotates as `Kept[type]`.

    They may be numbers, strings, None, dataclasses of such, tuples, lists, deques, sets and dicts
    of them, a torch.Generator, and other Resumables (also in a list or a dict).

        class Latch(Resumable):
            severity: Kept[str]
            _calm_since: Kept[int | None]
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the memory as primitives (a generator's as a tensor)."""
        return {name.lstrip("_"): _saved(getattr(self, name)) for name in _memory_of(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a memory: all of it, or nothing.

        Raises:
            UsageError: an entry is missing, unknown or of another type; nothing is changed then.
        """
        for assign in list(_planned_memory(self, state, type(self).__name__)):
            assign()

    def resumed(self) -> None:
        """Called when a memory was taken over, for what follows from it."""


def _planned(part: Any, state: Any, place: str) -> Iterator[_Assign]:
    """Check a state against a part; yield what would load it."""
    if not _has_memory(part):
        return
    if getattr(type(part), "load_state_dict", None) is not Resumable.load_state_dict:
        # of a user's own rule or controller
        yield functools.partial(part.load_state_dict, state)
        return
    yield from _planned_memory(part, state, place)


def _planned_memory(part: Resumable, state: Any, place: str) -> Iterator[_Assign]:
    hints = _memory_of(part)
    _same_names(state, {name.lstrip("_") for name in hints}, place)
    for name, hint in hints.items():
        key, present = name.lstrip("_"), getattr(part, name)
        yield from _assigned(part, name, state[key], hint, present, f"{place}.{key}")
    yield part.resumed


def _assigned(
    part: Any, name: str, entry: Any, hint: Any, present: Any, place: str
) -> Iterator[_Assign]:
    if _has_memory(present):
        yield from _planned(present, entry, place)
    elif isinstance(present, torch.Generator):
        if not isinstance(entry, torch.Tensor) or entry.dtype != torch.uint8:
            raise _unfit(place, "the state of a random generator", entry)
        # map_location may have carried it to another device
        yield functools.partial(present.set_state, entry.cpu())
    elif _has_members(present, hint):
        yield from _assigned_each(present, entry, place)
    else:
        value = _read(entry, hint, place)
        if isinstance(present, deque):
            value = deque(value, maxlen=present.maxlen)
        yield functools.partial(setattr, part, name, value)


def _assigned_each(present: Any, entry: Any, place: str) -> Iterator[_Assign]:
    if isinstance(present, dict):
        _same_names(entry, set(present), place)
        for key, inner in present.items():
            yield from _planned(inner, entry[key], f"{place}.{key}")
        return
    if not isinstance(entry, list | tuple) or len(entry) != len(present):
        raise _unfit(place, f"a list of {len(present)}", entry)
    for i, (inner, inner_state) in enumerate(zip(present, entry, strict=True)):
        yield from _planned(inner, inner_state, f"{place}[{i}]")


def _has_members(value: Any, hint: Any) -> bool:
    """Tell whether it is a list or a dict of parts, each with a memory or without, or of none."""
    if not isinstance(value, list | tuple | dict):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return Resumable in get_args(hint) or any(map(_has_memory, inner))


def _has_memory(value: Any) -> bool:
    return isinstance(value, Resumable) or (
        hasattr(value, "load_state_dict") and not isinstance(value, torch.Generator)
    )


def _memory_of(part: Resumable) -> dict[str, Any]:
    return _kept(cast(Any, type(part)))


@functools.cache
def _kept(kind: Any) -> dict[str, Any]:
    """Return the attributes that are a class's memory, with their types."""
    hints = get_type_hints(kind, include_extras=True)
    return {
        name: get_args(hint)[0]
        for name, hint in hints.items()
        if get_origin(hint) is Annotated and _MARK in get_args(hint)[1:]
    }


def _saved(value: Any) -> Any:
    if _has_memory(value):
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if is_dataclass(value) and not isinstance(value, type):
        return _saved(asdict(value))
    if isinstance(value, Mapping):
        return {key: _saved(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(_saved, value))
    if isinstance(value, _SEQUENCES):
        return [_saved(entry) for entry in value]
    # a user's own part may have no memory
    return value if value is None or isinstance(value, str | int | float) else None


def _read(entry: Any, hint: Any, place: str) -> Any:
    """Return an entry as the type that was declared for it."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return entry
    if origin in (Union, types.UnionType):
        return _read_one_of(entry, arguments, place)
    if is_dataclass(origin):
        return _read_dataclass(entry, origin, place)
    if origin in _SEQUENCES:
        return _read_sequence(entry, origin, arguments, place)
    if origin is dict:
        if not isinstance(entry, Mapping):
            raise _unfit(place, "a dict", entry)
        return {key: _read(e, arguments[1], f"{place}.{key}") for key, e in entry.items()}
    return _read_plain(entry, origin, arguments, place)


def _read_plain(entry: Any, kind: Any, choices: tuple[Any, ...], place: str) -> Any:
    if kind in _PLAIN:
        fits = isinstance(entry, _PLAIN[kind]) and isinstance(entry, bool) == (kind is bool)
        return kind(entry) if fits else _refuse(place, f"of type {kind.__name__}", entry)
    known = choices or (None,)  # of a Literal, or of None
    fits = any(entry is one or entry == one for one in known)
    return entry if fits else _refuse(place, " or ".join(map(repr, known)), entry)


def _read_dataclass(entry: Any, kind: Any, place: str) -> Any:
    hints = get_type_hints(kind)
    _same_names(entry, set(hints), place)
    return kind(**{n: _read(entry[n], hint, f"{place}.{n}") for n, hint in hints.items()})


def _read_one_of(entry: Any, hints: tuple[Any, ...], place: str) -> Any:
    for hint in hints:
        try:
            return _read(entry, hint, place)
        except UsageError as error:
            if hint is hints[-1] and entry is not None:
                raise error
    names = " or ".join(getattr(hint, "__name__", str(hint)) for hint in hints)
    raise _unfit(place, names, entry)


def _read_sequence(entry: Any, kind: Any, hints: tuple[Any, ...], place: str) -> Any:
    if not isinstance(entry, list | tuple):
        raise _unfit(place, "a list", entry)
    fixed = kind is tuple and Ellipsis not in hints
    if fixed and len(entry) != len(hints):
        raise _unfit(place, f"a list of {len(hints)}", entry)
    each = hints if fixed else hints[:1] * len(entry)
    pairs = enumerate(zip(entry, each, strict=True))
    return kind(_read(e, hint, f"{place}[{i}]") for i, (e, hint) in pairs)


def _same_names(state: Any, wanted: set[str], place: str) -> None:
    if not isinstance(state, Mapping):
        raise _unfit(place, f"a dict with {', '.join(sorted(wanted))}", state)
    missing, unknown = sorted(wanted - set(state)), sorted(set(state) - wanted, key=str)
    if missing or unknown:
        found = [f"no {name!r}" for name in missing] + [f"an unknown {name!r}" for name in unknown]
        raise UsageError(f"the state of {place} has {' and '.join(found)}. {_REMEDY}")


def _refuse(place: str, wanted: str, entry: Any) -> NoReturn:
    raise _unfit(place, wanted, entry)


def _unfit(place: str, wanted: str, entry: Any) -> UsageError:
    return UsageError(f"the state of {place} must be {wanted}, got {entry!r:.80}. {_REMEDY}")


_REMEDY = (
    "Load a state that this version of geomwatch has saved, into a monitor with the same rules and "
    "controllers; or start without it. Nothing was changed."
)
