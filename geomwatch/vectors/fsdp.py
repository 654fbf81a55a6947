"""Parameters that FSDP2 has cut over the ranks, put together for as long as a probe lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from geomwatch.vectors.layout import whole

_FSDP = "torch.distributed.fsdp"


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Tell whether any of them is a DTensor."""
    return any(hasattr(t, "full_tensor") for t in tensors)


@contextlib.contextmanager
def unsharded(modules: Sequence[nn.Module]) -> Iterator[Callable[[Tensor], Tensor]]:
    """Put whole parameters in the place of shards, and FSDP's own hooks aside.

    Each rank then has a replica it can differentiate twice, which FSDP's parameters can't be
    (autograd.grad does not reach them). Yields a function from a parameter to its stand-in. The
    memory of one more copy of all parameters; one all-gather.
    """
    copies: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = _replica(tensor)
        return copies[id(tensor)]

    tables: list[tuple[dict[str, Any], list[tuple[str, Any]]]] = []
    for module in modules:
        table: dict[str, Any] = module._parameters
        tables.append((table, list(table.items())))
    with _fsdp_hooks_off(modules):
        try:
            for table, items in tables:
                table.update({key: stand_in(p) for key, p in items if p is not None})
            yield stand_in
        finally:
            for table, items in tables:
                table.update(items)


def reshard(modules: Sequence[nn.Module]) -> None:
    """Have every module hold its shards: a forward pass without backward leaves the root whole."""
    for module in modules:
        if is_fully_sharded(module):
            wrapped: Any = module
            wrapped.reshard()


def is_fully_sharded(module: nn.Module) -> bool:
    """Tell whether fully_shard has made a module its own."""
    return any(kind.__module__.startswith(_FSDP) for kind in type(module).__mro__)


def _replica(parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "full_tensor"):
        return parameter
    return nn.Parameter(whole(parameter).detach().clone(), parameter.requires_grad)


@contextlib.contextmanager
def _fsdp_hooks_off(modules: Sequence[nn.Module]) -> Iterator[None]:
    tables: list[dict[int, Any]] = [
        table for m in modules for table in (m._forward_pre_hooks, m._forward_hooks)
    ]
    filled = [(table, list(table.items())) for table in tables if table]
    try:
        for table, items in filled:
            table.clear()
            table.update({key: hook for key, hook in items if not _is_fsdps(hook)})
        yield
    finally:
        for table, items in filled:
            table.clear()
            table.update(items)


def _is_fsdps(hook: Any) -> bool:
    """Its hooks are methods of its state, or functions of its own modules."""
    owner = getattr(hook, "__self__", None)
    module = type(owner).__module__ if owner is not None else getattr(hook, "__module__", "")
    return str(module).startswith(_FSDP)
