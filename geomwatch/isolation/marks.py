"""Where things stand that a loss can reach: positions, lengths and values, to be compared."""

from __future__ import annotations

import contextlib
import io
import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.isolation.reach import CONTAINERS, GENERATORS, inside, length

_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_LARGEST = 1_000_000  # elements of a tensor whose values are compared
_MOST, _DEEPEST = 20_000, 6
_SKIPPED = (type, types.ModuleType, torch.Generator, *GENERATORS)


def marks(model: nn.Module, loss_fn: Callable[..., Any]) -> dict[str, object]:
    """Return by name where the things stand that a loss can reach.

    Numbers, texts and lengths, values of tensors, positions of iterators and files: in what the
    loss names (its closure, defaults, globals), in its owner and its arguments, in what functions
    of the user's that it names name in turn, and in attributes of the model. Objects are known by
    what is in them, not by which they are.
    """
    found: dict[str, object] = {}
    times: Counter[str] = Counter()  # that a name is taken: an iterator's is that of what it holds
    seen: set[int] = set()
    waiting: list[tuple[str, object, int]] = [("loss_fn", loss_fn, 0)]
    waiting += [(name or "model", m, 0) for name, m in model.named_modules()]
    for name, item, depth in waiting:  # grows
        if id(item) in seen or len(seen) > _MOST or isinstance(item, _SKIPPED):
            continue
        if not isinstance(item, _SCALARS):
            seen.add(id(item))
        with contextlib.suppress(Exception):  # of what has no length, say, but ought to
            mark = _mark(item)
            if mark is not None:
                found[name + "*" * times[name]] = mark
                times[name] += 1
        if depth < _DEEPEST:
            waiting += [(inner, value, depth + 1) for inner, value in _inside(name, item)]
    return found


def goes_on(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """Name what stands elsewhere, or is new or gone; of what lies within one another the inner."""
    differ = [n for n in {**before, **after} if before.get(n, before) != after.get(n, after)]
    names = list(dict.fromkeys(name.rstrip("*") for name in differ))
    return [n for n in names if not any(o != n and o.startswith((f"{n}.", f"{n}[")) for o in names)]


def _mark(item: Any) -> object:
    """Return what is to be compared of a thing itself; None for what only holds others."""
    for kinds, way in _MARKS:
        if isinstance(item, kinds):
            return way(item)
    hint = getattr(item, "__length_hint__", None)  # of an iterator over something of a known length
    return int(hint()) if hint is not None and hasattr(item, "__next__") else None


def _of_tensor(tensor: Tensor) -> object:
    if isinstance(tensor, nn.Parameter) or tensor.is_inference() or tensor.device.type == "meta":
        return None
    if tensor.numel() > _LARGEST:
        return tensor._version
    with torch.no_grad(), contextlib.suppress(Exception):  # of a layout without sums, say
        values = tensor.detach()
        values = values if values.layout == torch.strided else values.to_dense()
        return repr(values.double().sum().item()), tuple(values.shape)
    return None


def _position(file: Any) -> object:
    with contextlib.suppress(Exception):  # closed, a pipe, or read line by line
        return file.tell()
    with contextlib.suppress(Exception):
        return file.buffer.tell()
    return None


def _inside(name: str, item: Any) -> Iterator[tuple[str, object]]:
    if isinstance(item, nn.Module):  # its parameters and buffers are put back
        return ((f"{name}.{key}", v) for key, v in vars(item).items() if key[0] != "_")
    return iter(()) if isinstance(item, _SCALARS) else inside(name, item)


def _of_array(array: Any) -> object:
    return hash(array.tobytes()) if array.size <= _LARGEST else None


def _of_generator(generator: types.GeneratorType[Any, Any, Any]) -> object:
    return None if generator.gi_frame is None else generator.gi_frame.f_lasti


_MARKS: list[tuple[Any, Callable[[Any], object]]] = [
    ((*_SCALARS, itertools.count), repr),
    (Tensor, _of_tensor),
    (np.ndarray, _of_array),
    (io.IOBase, _position),
    (CONTAINERS, length),
    (types.GeneratorType, _of_generator),
]
