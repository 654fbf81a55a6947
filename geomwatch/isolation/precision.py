"""The precision a probe computes in, for as long as it needs it: until the block around ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from geomwatch.isolation.undo import enter, later, swap, until_here


def recast(modules: Sequence[nn.Module], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Put copies of all floating-point parameters and buffers at `dtype` in their place.

    Returns a function from a parameter or buffer to its stand-in (tied ones share one). The
    originals are untouched, and back in their place when the block around ends. New tensors of an
    unnamed precision are made at `dtype` too.
    """
    copies: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = _copy(tensor, dtype)
        return copies[id(tensor)]

    tables = [cast(dict[str, Any], t) for m in modules for t in (m._parameters, m._buffers)]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a ScriptModule keeps its parameters to itself and can't be recast")
    for table in tables:
        later(functools.partial(table.update, list(table.items())))
    later(functools.partial(torch.set_default_dtype, torch.get_default_dtype()))
    torch.set_default_dtype(dtype)
    for table in tables:
        table.update({key: stand_in(t) for key, t in table.items() if t is not None})
    return stand_in


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    wanted = dtype.to_complex() if tensor.is_complex() else dtype
    values = tensor.detach().to(wanted, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


def autocast_off(device_types: Iterable[str]) -> None:
    """Switch autocast off: the caller's, and one that the loss itself enters."""
    own: Any = torch.autocast
    enter_enabled = own.__enter__

    def enter_disabled(context: Any) -> Any:
        with until_here():
            later(functools.partial(setattr, context, "_enabled", context._enabled))
            context._enabled = False
            return enter_enabled(context)

    for device_type in device_types:
        enter(torch.autocast(device_type, enabled=False))
    swap(own, "__enter__", enter_disabled)
