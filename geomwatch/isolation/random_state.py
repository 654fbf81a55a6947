"""The global random generators: of torch on every kind of device, of NumPy and of Python."""

from __future__ import annotations

import random
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from geomwatch.isolation.saved import same_state

# The devices of torch that have generators of their own, beside a backend of the user's.
_DEVICES = ("cuda", "xpu", "mps", "mtia", "hpu")


@dataclass(frozen=True, slots=True)
class Source:
    """A generator of the whole process."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


@dataclass
class Draws:
    """Who draws from the global generators, by their names, as far as is known.

    Those that other threads draw from, and the loss does not, are theirs: nobody sets them back.
    """

    by_loss: set[str] = field(default_factory=set)
    by_others: set[str] = field(default_factory=set)
    by_whom: set[str] = field(default_factory=set)  # somebody has, while other threads were alive

    def are_others(self, name: str) -> bool:
        """Tell whether a generator that has changed is left alone; note it if that is doubtful."""
        if name not in self.by_loss | self.by_others and threading.active_count() > 1:
            self.by_whom.add(name)
        return name in self.by_others


class RandomState:
    """Where the global generators are."""

    def __init__(self, draws: Draws | None = None) -> None:
        self._draws = draws or Draws()
        self._states = [(source, source.read()) for source in sources()]

    def anew(self) -> RandomState:
        """Return where they are now."""
        return RandomState(self._draws)

    def restore(self) -> None:
        """Set back those that were drawn from."""
        for source, state in self._states:
            if not same_state(source.read(), state) and not self._draws.are_others(source.name):
                source.write(state)

    def changed(self) -> list[str]:
        """Name those that were drawn from since."""
        return [s.name for s, state in self._states if not same_state(s.read(), state)]


def sources() -> Iterator[Source]:
    """Yield the generators that are in use."""
    yield Source("torch", torch.get_rng_state, torch.set_rng_state)
    yield Source("NumPy", np.random.get_state, np.random.set_state)
    yield Source("Python", random.getstate, random.setstate)
    for kind in dict.fromkeys((*_DEVICES, torch._C._get_privateuse1_backend_name())):
        module = getattr(torch, kind, None)
        if isinstance(module, types.ModuleType) and _is_in_use(module):
            yield from _of_devices(kind, module)


def _of_devices(kind: str, module: Any) -> Iterator[Source]:
    if hasattr(module, "get_rng_state_all") and hasattr(module, "set_rng_state_all"):
        yield Source(f"torch on {kind}", module.get_rng_state_all, module.set_rng_state_all)
    elif kind == "mps":  # there is one
        yield Source("torch on mps", module.get_rng_state, module.set_rng_state)
    elif hasattr(module, "get_rng_state"):
        for index in range(module.device_count()):
            yield _of_device(module, torch.device(kind, index))


def _of_device(module: Any, device: torch.device) -> Source:
    def write(state: Any) -> None:
        module.set_rng_state(state, device)

    return Source(f"torch on {device}", partial(module.get_rng_state, device), write)


def _is_in_use(module: Any) -> bool:
    """Tell whether a device has been used; to ask an unused one for its state would start it."""
    if module is torch.mps:
        return torch.backends.mps.is_available()
    asked = getattr(module, "is_initialized", None) or getattr(module, "is_available", None)
    return asked is not None and bool(asked())
