"""The same model at another precision, for as long as a probe needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def recast(
    modules: Sequence[nn.Module], dtype: torch.dtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put copies of all floating-point parameters and buffers at `dtype` in their place.

    Yields a function from a parameter or buffer to its stand-in (tied ones share one). The
    originals are untouched and back in their place afterwards. New tensors of an unnamed
    precision are made at `dtype` too.
    """
    copies: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = _copy(tensor, dtype)
        return copies[id(tensor)]

    tables = [cast(dict[str, Any], t) for m in modules for t in (m._parameters, m._buffers)]
    if not all(isinstance(table, dict) for table in tables):
        raise TypeError("a ScriptModule keeps its parameters to itself and can't be recast")
    default = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        for table in tables:
            stack.callback(table.update, list(table.items()))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(dtype)
        for table in tables:
            table.update({key: stand_in(t) for key, t in table.items() if t is not None})
        yield stand_in


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    values = tensor.detach().to(dtype, copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values, requires_grad=tensor.requires_grad)
    return values


@contextlib.contextmanager
def autocast_off(device_types: Iterable[str]) -> Iterator[None]:
    """Switch autocast off: the caller's, and one that the loss itself enters."""
    own: Any = torch.autocast
    enter = own.__enter__

    def enter_disabled(context: Any) -> Any:
        context._enabled, wanted = False, context._enabled
        try:
            return enter(context)
        finally:
            context._enabled = wanted

    with contextlib.ExitStack() as stack:
        for device_type in device_types:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        own.__enter__ = enter_disabled
        stack.callback(setattr, own, "__enter__", enter)
        yield
