"""An optimizer that takes steps of ours: all that they change is put back bit for bit."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from geomwatch.errors import WithheldError
from geomwatch.isolation.saved import CONTAINERS, Saved, SavedContainer, SavedTensor
from geomwatch.isolation.undo import later

_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class OptimizerAside:
    """Weights, state, rates and gradients of a torch optimizer, held on the host.

    From here to the end of the block around (see `undo`) its step hooks are off, and those of all
    optimizers. `restore` puts everything back for another try, the end of the block for good: in
    place, so that a scheduler, a compiled step and the loop keep what they hold. The scheduler
    itself is never called: steps are those of the class, behind what wraps the instance.

    Raises:
        WithheldError: a step needs a closure, or changes what can't be put back.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._parts = list(_parts(optimizer))
        for part in self._parts:
            _check(part)
        self._saved: list[Saved] = []
        self._seen: set[int] = set()
        self._gradients: dict[Tensor, Tensor | None] = {}
        for part in self._parts:
            self._visit(vars(part))
        # Containers first: they put those tensors back in place whose values are put back next.
        self._saved.sort(key=lambda saved: not isinstance(saved, SavedContainer))
        later(self._finish)
        self._hooks_off()

    @property
    def params(self) -> list[Tensor]:
        """The parameters that a step may change."""
        groups = (group for part in self._parts for group in part.param_groups)
        return list(dict.fromkeys(p for group in groups for p in group["params"]))

    def step(self, factor: float) -> None:
        """Take one step at `factor` times the present rates, on the gradients that are there."""
        groups = {id(g): g for part in self._parts for g in part.param_groups}.values()
        rates = [group.get("lr") for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate * factor
        type(self._optimizer).step(self._optimizer)
        for group, rate in zip(groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate

    def restore(self) -> None:
        """Put everything back."""
        for saved in self._saved:
            saved.restore()
        for p, gradient in self._gradients.items():
            p.grad = gradient

    def _finish(self) -> None:
        self.restore()
        for saved in self._saved:
            saved.finish()

    def _visit(self, value: object) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._saved.append(SavedTensor("a tensor", value, always=True, on_host=True))
            if value.requires_grad and value.is_leaf:
                self._gradients[value] = value.grad
        elif isinstance(value, CONTAINERS):
            self._saved.append(SavedContainer("a container", value))
        for item in _items(value):
            self._visit(item)

    def _hooks_off(self) -> None:
        module = sys.modules[torch.optim.Optimizer.__module__]
        every = [getattr(module, name) for name in _GLOBAL_HOOKS if hasattr(module, name)]
        every += [getattr(p, name) for p in self._parts for name in _HOOKS if hasattr(p, name)]
        for hooks in every:
            later(functools.partial(_refill, hooks, dict(hooks)))
            hooks.clear()


def _items(value: Any) -> list[Any]:
    """List what a container holds, but for the hooks of an optimizer."""
    if isinstance(value, dict):
        return [item for key, item in value.items() if not (type(key) is str and key in _HOOKS)]
    kinds: Any = (tuple, *CONTAINERS)
    return list(value) if isinstance(value, kinds) else []


def _refill(hooks: dict[Any, Any], items: dict[Any, Any]) -> None:
    hooks.clear()
    hooks.update(items)


def _parts(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those that it is made of."""
    yield optimizer
    for value in vars(optimizer).values():
        inner = value if isinstance(value, list | tuple) else [value]
        yield from (part for part in inner if isinstance(part, torch.optim.Optimizer))


def _check(optimizer: Any) -> None:
    name = type(optimizer).__name__
    step: Callable[..., Any] | None = getattr(type(optimizer), "step", None)
    if step is None or not hasattr(optimizer, "param_groups"):
        raise WithheldError(f"{name} is no torch optimizer")
    needed = [
        p.name
        for p in list(inspect.signature(step).parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise WithheldError(f"step() of {name} needs {', '.join(needed)}")
