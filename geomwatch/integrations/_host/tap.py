"""Methods of a host's objects with something around them: seen as they are called, or silenced."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

Method: TypeAlias = Callable[..., Any]
Around: TypeAlias = Callable[[Method, Sequence[Any], dict[str, Any]], Any]

_ABSENT = object()


class Tap:
    """Stands around methods of single objects, which do what they did before.

    `close` takes it away. Where somebody has put another around ours meanwhile, ours stays and
    passes calls on.
    """

    def __init__(self) -> None:
        self.is_open = True
        self._shadows: list[Shadow] = []

    def stand_around(self, owner: Any, name: str, around: Around) -> None:
        """Have `around(original, args, kwargs)` called in place of `owner.name(...)`."""
        self._shadows.append(Shadow(owner, name, around))

    def close(self) -> None:
        """Leave the objects as they were."""
        self.is_open = False
        for shadow in self._shadows:
            shadow.remove()
        self._shadows = []


class Shadow:
    """A method of one object with something around it; the bare method when copied or pickled."""

    def __init__(self, owner: Any, name: str, around: Around) -> None:
        original = getattr(owner, name)
        functools.update_wrapper(self, original)  # hosts look at signatures
        self._owner, self._name, self._around, self._original = owner, name, around, original
        self._before = vars(owner).get(name, _ABSENT)  # somebody else's, if any
        vars(owner)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method, through what is around it."""
        return self._around(self._original, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._owner, self._name)

    def remove(self) -> None:
        """Give the object its own method back, unless another one stands around this."""
        if vars(self._owner).get(self._name) is self:
            _put(self._owner, self._name, self._before)


def named(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give an object another attribute for a while."""
    before = vars(owner).get(name, _ABSENT)
    vars(owner)[name] = value
    try:
        yield
    finally:
        _put(owner, name, before)


def silence(*args: Any, **kwargs: Any) -> None:
    """Stand in for what logs or prints."""


def _put(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value
