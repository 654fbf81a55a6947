"""Batches of any shape a user brings: tensors, tuples, dicts, nested, and objects of one's own."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Path: TypeAlias = tuple[Any, ...]  # keys, indices and names that lead to a part of a batch
DESCEND: Any = object()  # what a visitor returns of a part that it leaves as it is


class Carrier:
    """A host's own object around a batch: what is copied and cut is the batch inside."""

    __slots__ = ()

    def carried(self) -> Any:
        """Return the batch."""
        raise NotImplementedError

    def carrying(self, batch: Any, share: float) -> Self:
        """Return the same around another batch, which is this `share` of the one inside."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A batch, or a piece of one, in the mean that a loss is over several."""

    batch: Any
    weight: float
    items: int
    factor: float = 1.0  # of its loss: N / n for a piece of a sum over N items


def fresh_copy(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy a batch, so that a loss that pops a key or scales its input in place changes nothing.

    Tensors and arrays are cloned (which also turns inference tensors into ordinary ones),
    containers and batch objects rebuilt; anything else, and what refuses to be copied, is passed
    through. With `dtype`, floating-point and complex tensors are cast to that precision.
    """

    def visit(path: Path, part: Any) -> Any:
        if not isinstance(part, Tensor | np.ndarray):
            return DESCEND
        return _clone(part) if dtype is None else cast(_clone(part), dtype)

    return rebuilt(batch, visit)


def shell(batch: Any) -> Any:
    """Return the same tensors and arrays in containers of the copy's own."""
    return rebuilt(batch, lambda path, part: DESCEND)


def fingerprint(batch: Any) -> tuple[float, ...]:
    """Return numbers that two batches share when they hold the same items in any order."""
    return tuple(_absolute_sum(t.detach()) for t in tensors(batch))


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, depth first."""
    yield from (part for _, part in parts(batch) if isinstance(part, Tensor))


def parts(batch: Any, *, also: Callable[[Any], bool] | None = None) -> list[tuple[Path, Any]]:
    """List the tensors and arrays of a batch with their paths, depth first.

    And containers of which `also` says so, before what is in them.
    """
    found: list[tuple[Path, Any]] = []

    def note(path: Path, part: Any) -> Any:
        leaf = isinstance(part, Tensor | np.ndarray)
        if leaf or (also is not None and also(part)):
            found.append((path, part))
        return part if leaf else DESCEND

    rebuilt(batch, note)
    return found


def rebuilt(batch: Any, visit: Callable[[Path, Any], Any], path: Path = ()) -> Any:
    """Copy a batch with what `visit` makes of its parts, from the outside in.

    Where it returns DESCEND a tensor or a thing that is no container is kept, and a container made
    anew of what its own parts become.
    """
    made = visit(path, batch)
    if made is not DESCEND:
        return made
    if isinstance(batch, Carrier):
        return batch.carrying(rebuilt(batch.carried(), visit, path), 1.0)
    if isinstance(batch, dict):
        pairs = {key: rebuilt(value, visit, (*path, key)) for key, value in batch.items()}
        return filled(batch, pairs, dict.__setitem__)
    if isinstance(batch, list | tuple) and not isinstance(batch, torch.Size):
        values = [rebuilt(value, visit, (*path, i)) for i, value in enumerate(batch)]
        with contextlib.suppress(Exception):  # of a list that is made in a way of its own
            return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
        return batch
    names = _attributes(batch)
    if not names and isinstance(batch, Mapping):
        return {key: rebuilt(value, visit, (*path, key)) for key, value in batch.items()}
    own = getattr(batch, "__dict__", {})  # past properties of the same name
    pairs = {
        name: rebuilt(own[name] if name in own else getattr(batch, name), visit, (*path, name))
        for name in names
    }
    return filled(batch, pairs, _set) if names else batch


def _set(batch: Any, name: str, value: Any) -> None:
    """Set an attribute past a frozen dataclass, a property, and a __setattr__ of its own."""
    own = getattr(batch, "__dict__", {})
    if name in own:
        own[name] = value
    else:
        object.__setattr__(batch, name, value)


def filled(batch: Any, pairs: Mapping[Any, Any], put: Callable[[Any, Any, Any], None]) -> Any:
    """Return a shallow copy with other contents; the thing itself where it can't be copied."""
    try:
        replica = copy.copy(batch)
        for key, value in pairs.items():
            put(replica, key, value)
    except Exception:  # whatever an object says that holds a lock or a handle
        return batch
    return replica


def _attributes(batch: Any) -> list[str]:
    """What a batch object holds; nothing if it is no batch but, say, a module or a tokenizer.

    It is a dataclass, a mapping or a namespace, or it can be moved as loaders and hosts move
    batches: by `to(device)` or `pin_memory()`.
    """
    if isinstance(batch, type | nn.Module):
        return []
    fields = [f.name for f in dataclasses.fields(batch)] if dataclasses.is_dataclass(batch) else []
    is_batch = bool(fields) or isinstance(batch, Mapping | types.SimpleNamespace)
    if is_batch or any(callable(getattr(batch, move, None)) for move in ("to", "pin_memory")):
        return list({**dict.fromkeys(fields), **getattr(batch, "__dict__", {})})
    return []


def cast(part: Any, dtype: torch.dtype) -> Any:
    """Return a floating-point or complex tensor at a precision, anything else as it is."""
    if not isinstance(part, Tensor):
        return part
    if part.is_complex():
        return part.to(dtype.to_complex())
    return part.to(dtype) if part.is_floating_point() else part


def _absolute_sum(tensor: Tensor) -> float:
    signed = tensor.is_floating_point() or tensor.is_complex()  # abs() refuses bool
    widest = torch.float32 if tensor.device.type == "mps" else torch.float64
    if tensor.is_nested:
        return sum(_absolute_sum(piece) for piece in tensor.unbind())
    return float((tensor.abs() if signed else tensor).sum(dtype=widest))


def _clone(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf.copy()
    clone = leaf.detach().clone()
    return clone.requires_grad_() if leaf.requires_grad else clone
