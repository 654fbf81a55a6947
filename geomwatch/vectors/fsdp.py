"""Parameters that FSDP2 has cut over the ranks, put together for as long as a probe lasts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from geomwatch.isolation.undo import later
from geomwatch.vectors.layout import whole

_FSDP = "torch.distributed.fsdp"


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Tell whether any of them is a DTensor."""
    return any(hasattr(t, "full_tensor") for t in tensors)


def unshard(modules: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """Put whole parameters in the place of shards, and FSDP's own hooks aside.

    Each rank then has a replica it can differentiate twice, which FSDP's parameters can't be
    (autograd.grad does not reach them). Returns a function from a parameter to its stand-in. The
    memory of one more copy of all parameters; one all-gather. Undone when the block around ends.
    """
    copies: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = _replica(tensor)
        return copies[id(tensor)]

    _fsdp_hooks_off(modules)
    for module in modules:
        table: dict[str, Any] = module._parameters
        items = list(table.items())
        later(functools.partial(table.update, items))
        table.update({key: stand_in(p) for key, p in items if p is not None})
    return stand_in


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


def _fsdp_hooks_off(modules: Sequence[nn.Module]) -> None:
    for module in modules:
        for table in (module._forward_pre_hooks, module._forward_hooks):
            filled: dict[int, Any] = dict(table)
            if not filled:
                continue
            later(functools.partial(_refill, table, filled))
            _refill(table, {key: hook for key, hook in filled.items() if not _is_fsdps(hook)})


def _refill(table: Any, items: dict[int, Any]) -> None:
    table.clear()
    table.update(items)


def _is_fsdps(hook: Any) -> bool:
    """Its hooks are methods of its state, or functions of its own modules."""
    owner = getattr(hook, "__self__", None)
    module = type(owner).__module__ if owner is not None else getattr(hook, "__module__", "")
    return str(module).startswith(_FSDP)
