"""One thing that a Snapshot holds: how it is put back, or how to tell that it can't be."""

from __future__ import annotations

import operator
import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

# Larger ones are watched through their version, not copied: a module that keeps its data set as an
# attribute, or a large frozen network, must not double its memory in a probe.
_LARGEST_COPY = 1_000_000  # elements
CONTAINERS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)


class Saved:
    """Something that can be put back, at least in part."""

    def __init__(self, name: str) -> None:
        self.name = name

    def restore(self) -> None:
        """Put back what can be put back."""

    def finish(self) -> None:
        """Do what is due once, after the last `restore`."""

    def lost(self) -> bool:
        """Tell whether it has changed in a way that `restore` can't mend."""
        return False


class SavedTensor(Saved):
    """A tensor's values, written back where they were, behind autograd's back.

    That leaves the version counter alone, so that a graph that saved the tensor stays valid. The
    copy is beside the tensor or, `on_host`, in the memory of the host.
    """

    def __init__(
        self,
        name: str,
        tensor: Tensor,
        *,
        always: bool = False,
        on_host: bool = False,
        like: SavedTensor | None = None,
    ) -> None:
        super().__init__(name)
        self.tensor = tensor
        self._requires_grad = tensor.requires_grad
        self._version = _version(tensor)
        self._memory = tensor.data  # a loss may give the tensor other memory: p.data = ...
        self._values: Tensor | None = None
        # An inference tensor changes under inference_mode only, which is off in a probe.
        if (always or tensor.numel() <= _LARGEST_COPY) and not tensor.is_inference():
            values = _distinct(self._memory)
            self._values = values.to("cpu", copy=True) if on_host else _copy(values, like)
            self._counter = _unsafe_preserve_version_counter(tensor)

    def restore(self) -> None:
        """Write the values back, and undo a toggled requires_grad or a swapped `.data`."""
        tensor = self.tensor
        if tensor.is_leaf and tensor.requires_grad != self._requires_grad:
            tensor.requires_grad_(self._requires_grad)
        if self._values is None:
            return
        if _place(tensor) != _place(self._memory):
            tensor.data = self._memory
        _distinct(self._memory).copy_(self._values)

    def finish(self) -> None:
        """Set the version back too: a graph from before the probe would refuse another one."""
        if self._values is not None and self.tensor._version != self._version:
            self._counter.__exit__(None, None, None)

    def lost(self) -> bool:
        """Tell by its version whether a tensor that was not copied has changed."""
        return self._values is None and _version(self.tensor) != self._version


class SavedContainer(Saved):
    """The contents of a dict, list, set or deque, by identity, put back in place."""

    def __init__(self, name: str, container: Any) -> None:
        super().__init__(name)
        self._container = container
        # The methods of the built-in type: a Counter's update() counts, others refuse.
        self._type = next(kind for kind in CONTAINERS if isinstance(container, kind))
        self._contents = self._now()

    def restore(self) -> None:
        """Refill it, if its items are not the same objects any more."""
        now = self._now()
        if len(now) == len(self._contents) and all(map(operator.is_, now, self._contents)):
            return
        self._type.clear(self._container)
        if isinstance(self._container, dict):
            half = len(self._contents) // 2
            for key, value in zip(self._contents[:half], self._contents[half:], strict=True):
                self._type.__setitem__(self._container, key, value)
        elif isinstance(self._container, set):
            self._type.update(self._container, self._contents)
        else:
            self._type.extend(self._container, self._contents)

    def _now(self) -> list[Any]:
        if isinstance(self._container, dict):
            return [*self._container, *self._container.values()]
        return list(self._container)


class SavedObject(Saved):
    """Any other object: generators and arrays are put back, the rest is only watched."""

    def __init__(self, name: str, item: object) -> None:
        super().__init__(f"{name} ({type(item).__name__})")
        self._item = item
        self._state = _state(item)
        self._before = self._look()

    def restore(self) -> None:
        """Put back a generator or an array."""
        if self._state is not None and not same_state(_state(self._item), self._state):
            _set_state(self._item, self._state)

    def lost(self) -> bool:
        """Tell whether an attribute is another object, or looks changed itself."""
        now = self._look()
        # functools.cached_property and the like add attributes: watch what was there
        return any(
            key not in now or now[key][0] is not value or now[key][1] != mark
            for key, (value, mark) in self._before.items()
        )

    def _look(self) -> dict[str, tuple[object, object]]:
        """Each attribute, with what shows that its contents have changed."""
        if self._state is not None:
            return {}
        own = dict(getattr(self._item, "__dict__", {}))
        for kind in type(self._item).__mro__:
            slots = vars(kind).get("__slots__", ())
            for key in (slots,) if isinstance(slots, str) else slots:
                own[key] = getattr(self._item, key, None)
        return {key: (value, _mark(value)) for key, value in own.items()}


def _copy(values: Tensor, like: SavedTensor | None) -> Tensor:
    """Copy values, or share the copy that an earlier snapshot has made of the same ones."""
    held = None if like is None else like._values
    if held is not None and held.dtype == values.dtype and torch.equal(held, values):
        return held
    return values.clone()


def _distinct(tensor: Tensor) -> Tensor:
    """Leave out the repeats that `expand` makes: they share memory and can't be written."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


def _place(tensor: Tensor) -> object:
    """Where a tensor lies in memory; None for those that are more than one piece of memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _mark(value: object) -> object:
    if isinstance(value, Tensor):
        return _version(value)
    if not isinstance(value, CONTAINERS):
        return None
    items = value.values() if isinstance(value, dict) else value
    return len(value), sum(_version(item) for item in items if isinstance(item, Tensor))


def _state(item: object) -> Any:
    if isinstance(item, torch.Generator | np.random.RandomState):
        return item.get_state()
    if isinstance(item, np.random.Generator | np.random.BitGenerator):
        return _bits(item).state
    if isinstance(item, random.Random):
        return item.getstate()
    # Not a memmap, which may be a file that nobody wants written.
    if type(item) is np.ndarray and item.flags.writeable and item.size <= _LARGEST_COPY:
        return item.copy()
    return None


def _set_state(item: Any, state: Any) -> None:
    if isinstance(item, np.random.Generator | np.random.BitGenerator):
        _bits(item).state = state
    elif isinstance(item, np.ndarray):
        np.copyto(item, state)
    elif isinstance(item, random.Random):
        item.setstate(state)
    else:
        item.set_state(state)


def _bits(item: Any) -> Any:
    return item if isinstance(item, np.random.BitGenerator) else item.bit_generator


def same_state(a: Any, b: Any) -> bool:
    """Tell whether two states of a generator are the same."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, list) or (isinstance(a, tuple) and any(isinstance(x, np.ndarray) for x in a)):
        return all(map(same_state, a, b))
    return bool(a == b)
