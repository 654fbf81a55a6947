"""Frozen dataclasses as JSON and back, so that what the rules saw can be judged again."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

_PLAIN = (str, int, float, bool, type(None))


def encode(value: Any) -> Any:
    """Turn nested dataclasses, mappings and sequences into JSON, without fields at their default.

    Functions, which look when they are called, are left out of dataclasses.

    Raises:
        TypeError: something in it is neither of these nor a number or text.
    """
    if is_dataclass(value) and not isinstance(value, type):
        entries = {field.name: getattr(value, field.name) for field in fields(value)}
        kept = [f.name for f in fields(value) if not _is_default(f, entries[f.name])]
        return {name: encode(entries[name]) for name in kept if not callable(entries[name])}
    if isinstance(value, Mapping):
        return {str(key): encode(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"a stored value must be plain data, got {type(value).__name__}: {value!r}")


def decode(kind: Any, data: Any) -> Any:
    """Build a value of the annotated type `kind` from what `encode` has made of one.

    Fields that the class no longer has are passed over, new ones take their default: old runs can
    be judged by new rules as far as the rules need nothing that was not stored.
    """
    if data is None:
        return None
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in fields(kind)} & data.keys()
        return kind(**{name: decode(hints[name], data[name]) for name in known})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = [argument for argument in arguments if argument is not type(None)]
        return decode(inner[0], data) if len(inner) == 1 else data
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {key: decode(arguments[1], entry) for key, entry in data.items()}
    if origin is tuple:
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(decode(k, entry) for k, entry in zip(kinds, data, strict=True))
    if isinstance(origin, type) and isinstance(data, list):
        return [decode(arguments[0], entry) for entry in data]
    return data


def _is_default(field: Any, value: Any) -> bool:
    default = field.default
    return default is not MISSING and type(value) is type(default) and value == default
