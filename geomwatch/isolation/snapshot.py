"""The state that evaluating a loss can change, found and held together.

One Snapshot serves two ends. Restored before each evaluation inside a probe, it makes the loss a
deterministic function of the weights: dropout draws the same mask, spectral norm starts from the
same vectors. Restored at the end, it makes sure that training sees no trace of the probe.
"""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.isolation.reach import GENERATORS
from geomwatch.isolation.saved import (
    CONTAINERS,
    Saved,
    SavedContainer,
    SavedObject,
    SavedTensor,
)

HOOKS = ("_backward_hooks", "_backward_pre_hooks")  # of a module; `isolation` looks after them
_SCALARS = (int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device)
_PLAIN = frozenset(_SCALARS)  # what most of them are, without their subclasses
_CONTAINERS = frozenset(CONTAINERS)
_ITSELF = (nn.Module, Tensor, np.ndarray, tuple, *CONTAINERS, *GENERATORS)
_UNNAMED = ("_parameters", "_buffers", "_modules")
_LARGEST_SEARCH = 1_000  # items of a container that are looked into one by one


class Snapshot:
    """Random state, parameters, buffers, modes and Python attributes of some objects.

    Attributes are put back where they are scalars, tensors, arrays, random generators, modules or
    containers of such (nested); `changed_objects` names those that changed otherwise. Arrays and
    frozen tensors of more than a million elements are not copied: the latter are watched. Values
    that are still those of the snapshot `like` are shared with it: its copies serve both.
    """

    def __init__(
        self,
        objects: Iterable[object],
        *,
        like: Snapshot | None = None,
        rng: Any = None,
    ) -> None:
        held = [] if like is None else like._saved
        self._held = {id(s.tensor): s for s in held if isinstance(s, SavedTensor)}
        self.modules: list[nn.Module] = []
        self._rng = rng  # a RandomState
        self._saved: list[Saved] = []
        # Most containers of a module are hook dictionaries with nothing in them.
        self._empty: list[Any] = []
        self._roots = roots = list(objects)
        # An object that is looked after from the inside needs no watching from the outside.
        self._seen = {id(root) for root in roots if _is_plain(root)}
        for root in roots:
            self._visit(type(root).__name__, vars(root) if _is_plain(root) else root)
        # Containers first: they put those tensors back in place whose values are put back next.
        self._saved.sort(key=lambda saved: not isinstance(saved, SavedContainer))
        self._is_used = False

    def anew(self, *, sharing: bool = False) -> Snapshot:
        """Return one of the same objects as they are now; copies may be shared."""
        return Snapshot(self._roots, like=self if sharing else None, rng=self._rng.anew())

    def start(self) -> None:
        """Put everything back before an evaluation, unless it is the first."""
        if self._is_used:
            self.restore()
        self._is_used = True

    def restore(self) -> None:
        """Put everything back."""
        for container in self._empty:
            if container:
                container.clear()
        for saved in self._saved:
            saved.restore()
        if self._rng is not None:
            self._rng.restore()
        self._is_used = False  # not before: an interrupted one is to be done again

    def finish(self) -> None:
        """Put everything back for good."""
        self.restore()
        for saved in self._saved:
            saved.finish()

    def changed_objects(self) -> list[str]:
        """Name the attributes that changed and that `restore` can't put back."""
        return [saved.name for saved in self._saved if saved.lost()]

    def _visit(self, name: str, value: object) -> None:
        if isinstance(value, _SCALARS) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self._saved.append(SavedTensor(name, value, like=self._held.get(id(value))))
        elif isinstance(value, nn.Module):
            self._visit_module(name, value)
        elif type(value) in _CONTAINERS and not value:
            self._empty.append(value)
        elif isinstance(value, CONTAINERS):
            self._saved.append(SavedContainer(name, value))
            self._visit_items(name, value)
        elif isinstance(value, tuple):
            self._visit_items(name, value)
        elif not isinstance(value, type | types.ModuleType):
            self._saved.append(SavedObject(name, value))

    def _visit_module(self, name: str, module: nn.Module) -> None:
        self.modules.append(module)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in self._seen:
                self._seen.add(id(tensor))
                frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
                like = self._held.get(id(tensor))
                saved = SavedTensor(f"{name}.{key}", tensor, always=not frozen, like=like)
                self._saved.append(saved)
        for key, child in module._modules.items():  # a ScriptModule's are in no dict
            self._visit(f"{name}.{key}", child)
        self._visit(name, vars(module))

    def _visit_items(self, name: str, container: Any) -> None:
        if len(container) > _LARGEST_SEARCH:
            return
        pairs = container.items() if isinstance(container, dict) else enumerate(container)
        for key, item in pairs:
            # Most of what a module holds, and a walk over a large model is long: no call for it.
            kind = type(item)
            if kind in _PLAIN or key in HOOKS:
                continue
            if kind in _CONTAINERS and not item:
                self._empty.append(item)
                continue
            self._visit(name if key in _UNNAMED else f"{name}.{key}", item)


def _is_plain(root: object) -> bool:
    return hasattr(root, "__dict__") and not isinstance(root, _ITSELF)
