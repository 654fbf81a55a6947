"""What a loss can reach: the objects it names or holds, and the random generators among them."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import sys
import sysconfig
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)
# Saved as such: see `random_state`.
_GLOBALS = {id(torch.default_generator), id(np.random.mtrand._rand), id(random._inst)}
_LEAVES = (
    *(str, bytes, int, float, complex, type(None), Tensor, np.ndarray, np.generic, torch.dtype),
    *(torch.device, torch.UntypedStorage, types.ModuleType, types.CodeType, types.FrameType),
)
_PLAIN = frozenset({*_LEAVES, bool, nn.Parameter})  # most of what there is: no closer look
_EMPTY = frozenset({dict, OrderedDict, list, set})
CONTAINERS = (dict, list, tuple, set, frozenset, deque, types.MappingProxyType)
_LONGEST = 1_000  # a container is looked into up to that
_MOST = 20_000  # objects
_DEEPEST = 6  # objects within one another, beside modules and containers
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})


def captured_by(loss_fn: Callable[..., Any]) -> list[object]:
    """Find what a loss_fn carries along: itself or its owner, and the modules it names.

    Names are looked up in its closure, its defaults and its file, and in those of the functions
    from the same file that it names in turn.
    """
    found: list[object] = []
    waiting: list[object] = [loss_fn]
    seen: set[int] = set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.MethodType):
            found.append(item.__self__)
            waiting.append(item.__func__)
        elif isinstance(item, functools.partial):
            waiting += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, types.FunctionType):
            own = item.__globals__
            waiting += [
                value
                for _, value in named_in(item)
                if not isinstance(value, types.FunctionType) or value.__globals__ is own
            ]
        elif isinstance(item, nn.Module) or (item is loss_fn and hasattr(item, "__dict__")):
            found.append(item)
    return found


def named_in(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """Yield what a function can reach by a name: its closure, its defaults, globals of its file.

    Also attributes that it may look up in modules that it names.
    """
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield "a default", value
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            yield name, cell.cell_contents
    namespace = function.__globals__
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    for name in names & namespace.keys():
        value = namespace[name]
        yield name, value
        if isinstance(value, types.ModuleType) and not is_installed(value.__name__):
            members = vars(value)
            yield from ((f"{name}.{key}", members[key]) for key in names & members.keys())


def generators_in(*roots: object) -> list[Any]:
    """Return the random generators that can be reached from some objects, but for the global ones.

    Through attributes, slots, containers of up to a thousand things, closures, defaults, partials,
    methods, and names that functions use, where they are not those of installed packages. Some
    milliseconds at most.
    """
    found: list[Any] = []
    seen: set[int] = set(_GLOBALS)
    waiting = deque((root, 0) for root in roots)
    while waiting and len(seen) < _MOST:
        item, depth = waiting.popleft()
        if id(item) in seen or isinstance(item, _LEAVES):
            continue
        seen.add(id(item))
        if isinstance(item, GENERATORS):
            found.append(item)
        elif depth < _DEEPEST:
            deeper = depth + (not isinstance(item, (nn.Module, *CONTAINERS)))
            for _, inner in inside("", item):
                if type(inner) not in _PLAIN and not (type(inner) in _EMPTY and not inner):
                    waiting.append((inner, deeper))
    return found


def inside(name: str, item: Any) -> Iterator[tuple[str, object]]:
    """Yield what an object leads to at once, each by a name that begins with its own."""
    with contextlib.suppress(Exception):  # of a property of the user's, or a change meanwhile
        yield from _way_into(name, item)


def _way_into(name: str, item: Any) -> Iterator[tuple[str, object]]:
    for kinds, way in _WAYS:
        if isinstance(item, kinds):
            return way(name, item)
    if type(item).__module__ in ("builtins", "itertools") and hasattr(item, "__next__"):
        return ((name, value) for value in gc.get_referents(item))  # what it iterates over
    return _of_object(name, item)


def _of_class(name: str, item: type) -> Iterator[tuple[str, object]]:
    if not is_installed(item.__module__):
        yield from ((f"{name}.{key}", value) for key, value in vars(item).items())


def _of_container(name: str, item: Any) -> Iterator[tuple[str, object]]:
    if length(item) > _LONGEST:
        return
    kind = _kind(item)
    # by the methods of the built-in type: others may load or compute what they give
    pairs = kind.items(item) if hasattr(kind, "items") else enumerate(kind.__iter__(item))
    yield from ((f"{name}[{key!r:.40}]", value) for key, value in pairs)


def _kind(item: Any) -> Any:
    return next(kind for kind in CONTAINERS if isinstance(item, kind))


def length(item: Any) -> int:
    """Return the length of a container."""
    return int(_kind(item).__len__(item))


def _of_partial(name: str, item: functools.partial[Any]) -> Iterator[tuple[str, object]]:
    yield name, item.func
    yield f"{name}'s arguments", item.args
    yield f"{name}'s arguments", item.keywords


def _of_method(name: str, item: Any) -> Iterator[tuple[str, object]]:
    yield name, item.__self__
    yield name, getattr(item, "__func__", None)


def _of_function(name: str, item: types.FunctionType) -> Iterator[tuple[str, object]]:
    if not is_installed(item.__module__):
        yield from named_in(item)
    yield from ((f"{name}.{key}", value) for key, value in vars(item).items())


def _of_reference(name: str, item: weakref.ref[Any]) -> Iterator[tuple[str, object]]:
    yield name, item()


def _of_generator(name: str, item: types.GeneratorType[Any, Any, Any]) -> Any:
    yield name, item.gi_yieldfrom
    if item.gi_frame is not None:
        yield from ((f"{name}.{key}", value) for key, value in item.gi_frame.f_locals.items())


def _of_object(name: str, item: Any) -> Iterator[tuple[str, object]]:
    """Its attributes and slots, and what classes of the user's hold; of ours the batch alone."""
    if type(item).__module__.startswith("geomwatch."):
        yield name, item.carried() if hasattr(item, "carried") else None
        return
    yield from ((f"{name}.{key}", value) for key, value in getattr(item, "__dict__", {}).items())
    for kind in type(item).__mro__:
        slots = vars(kind).get("__slots__", ())
        for key in (slots,) if isinstance(slots, str) else slots:
            yield f"{name}.{key}", getattr(item, key, None)
        yield from _of_class(name, kind)


_WAYS: list[tuple[Any, Callable[[str, Any], Iterator[tuple[str, object]]]]] = [
    (type, _of_class),
    (CONTAINERS, _of_container),
    (functools.partial, _of_partial),
    ((types.MethodType, types.BuiltinFunctionType), _of_method),
    (types.FunctionType, _of_function),
    (weakref.ref, _of_reference),
    (types.GeneratorType, _of_generator),
]


@functools.cache
def is_installed(module: str | None) -> bool:
    """Tell whether a module is of an installed package or of Python itself, not of the user's."""
    if module is None:
        return False
    if module.partition(".")[0] in sys.stdlib_module_names and module != "__main__":
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and file.startswith(_INSTALLED)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The body of a function, and those of the lambdas and comprehensions in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)
