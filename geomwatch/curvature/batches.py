"""Batches of any shape a user brings: tensors, tuples, dicts, nested, and objects of one's own."""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fresh_copy(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """Copy a batch, so that a loss that pops a key or scales its input in place changes nothing.

    Tensors and arrays are cloned (which also turns inference tensors into ordinary ones),
    containers and batch objects rebuilt; anything else is passed through. With `dtype`,
    floating-point tensors are cast to it.
    """
    if dtype is None:
        return _rebuild(batch, _clone)
    return _rebuild(batch, lambda leaf: _cast(_clone(leaf), dtype))


def shell(batch: Any) -> Any:
    """Return the same tensors and arrays in containers of the copy's own."""
    return _rebuild(batch, lambda leaf: leaf)


def items(batch: Any) -> int:
    """Count the items: the length of the first tensor that has a dimension, else 1."""
    return next((t.shape[0] for t in _leaves(batch) if t.ndim > 0), 1)


def head(batch: Any, count: int) -> Any:
    """Return the first `count` items: every tensor as long as the batch is cut."""
    length = items(batch)
    return _rebuild(batch, lambda t: t[:count] if t.ndim and t.shape[0] == length else t)


def chunks(batch: Any, size: int) -> list[Any]:
    """Cut a batch into pieces of `size` items in their order; the last may be shorter."""
    length = items(batch)

    def piece(start: int) -> Any:
        stop = start + size
        return _rebuild(batch, lambda t: t[start:stop] if t.ndim and t.shape[0] == length else t)

    return [piece(start) for start in range(0, length, size)]


def cut(batch: Any, count: int, rng: torch.Generator) -> list[Any]:
    """Cut a batch into `count` pieces of random items, as long as one another but for one item.

    Random, because neighbours in a data set may be more or less alike than items drawn from it.
    """
    length = items(batch)
    order = torch.randperm(length, generator=rng, device=rng.device)

    def piece(chosen: Tensor) -> Any:
        def pick(t: Any) -> Any:
            if not t.ndim or t.shape[0] != length:
                return t
            return t[chosen.to(t.device)] if isinstance(t, Tensor) else t[chosen.cpu().numpy()]

        return _rebuild(batch, pick)

    return [piece(chosen) for chosen in order.tensor_split(count)]


def fingerprint(batch: Any) -> tuple[float, ...]:
    """Return numbers that two batches share when they hold the same items in any order."""
    return tuple(_absolute_sum(t.detach()) for t in tensors(batch))


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, depth first."""
    yield from (leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor))


def _leaves(batch: Any) -> list[Any]:
    """The tensors and arrays of a batch, depth first."""
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    _rebuild(batch, note)
    return found


def _rebuild(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Copy a batch with `function` applied to each tensor and array."""
    if isinstance(batch, Tensor | np.ndarray):
        return function(batch)
    if isinstance(batch, dict):
        rebuilt = copy.copy(batch)
        for key, value in batch.items():
            rebuilt[key] = _rebuild(value, function)
        return rebuilt
    if isinstance(batch, list | tuple):
        values = [_rebuild(value, function) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    names = _attributes(batch)
    if not names and isinstance(batch, Mapping):
        return {key: _rebuild(value, function) for key, value in batch.items()}
    if names:
        replica = copy.copy(batch)
        for name in names:
            # past a frozen dataclass, and past a __setattr__ of its own
            object.__setattr__(replica, name, _rebuild(getattr(batch, name), function))
        return replica
    return batch


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


def _absolute_sum(tensor: Tensor) -> float:
    signed = tensor.is_floating_point() or tensor.is_complex()  # abs() refuses bool
    widest = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float((tensor.abs() if signed else tensor).sum(dtype=widest))


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating else leaf


def _clone(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf.copy()
    clone = leaf.detach().clone()
    return clone.requires_grad_() if leaf.requires_grad else clone
