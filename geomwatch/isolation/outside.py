"""What a loss uses and changes beside the model and the batch, as far as it is known."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from geomwatch.isolation.random_state import Draws, RandomState
from geomwatch.isolation.reach import generators_in

_A_MOMENT = 0.02  # seconds in which other threads that draw often will have drawn


class Outside:
    """The memory, over probes, of what a loss draws from; see `curvature.side_effects`."""

    def __init__(self) -> None:
        self.draws = Draws()
        self.is_known = False
        self.in_use: list[torch.Generator] = []  # also what can't be reached

    def generators(self, *roots: object) -> list[Any]:
        """Return the private random generators that the loss may draw from."""
        reached = generators_in(*roots)
        return reached + [g for g in self.in_use if not any(g is other for other in reached)]

    @property
    def is_doubtful(self) -> bool:
        """Whether it is to be found out, for the first time or again, who draws from what."""
        return not self.is_known or bool(self.draws.by_whom)


class InUse(TorchDispatchMode):
    """Notes the torch.Generators that operations draw from, with their states before."""

    # Operators that call others, such as flex_attention, are passed on.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self._states: dict[int, tuple[torch.Generator, torch.Tensor]] = {}

    @property
    def generators(self) -> list[torch.Generator]:
        """Those noted."""
        return [generator for generator, _ in self._states.values()]

    def put_back(self) -> None:
        """Put them back to where they were."""
        for generator, state in self._states.values():
            generator.set_state(state)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in (kwargs or {}).values():
            if isinstance(value, torch.Generator) and id(value) not in self._states:
                self._states[id(value)] = value, value.get_state()
        return func(*args, **(kwargs or {}))


def drawn_by_others() -> set[str]:
    """Return which global generators other threads draw from while this one rests."""
    if threading.active_count() == 1:
        return set()
    before = RandomState()
    time.sleep(_A_MOMENT)
    return set(before.changed())
