"""Numbers of a host that it reads at each step, and that controllers may set while it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from geomwatch.controllers.actuators import CLIP, Actuator
from geomwatch.controllers.resizable import Windows


class HostClip(Actuator):
    """Sets the norm that a host clips at, as `host.name`, never above the host's own.

    Probes come after clipping, so that a norm holds from the next step on.
    """

    def __init__(self, host: Any, name: str) -> None:
        super().__init__(CLIP)
        self._host, self._name, self._base = host, name, getattr(host, name)

    def set(self, to: float) -> None:
        """Clip at this norm, or at the host's own if that is less; at infinity at its own."""
        super().set(to)
        own = self._base or math.inf  # 0 and None are none
        setattr(self._host, self._name, self._base if own <= to else to)

    def close(self) -> None:
        """Give the host its own norm back."""
        setattr(self._host, self._name, self._base)


class HostAccumulation(Windows):
    """Sets the number of micro-batches in a window, as `host.name`, where windows end.

    At any other moment a window would be stepped with that is too short, or never zeroed. Hosts
    say by `counted` when such a moment may be there.
    """

    def __init__(self, host: Any, name: str) -> None:
        super().__init__(getattr(host, name))
        self._host, self._name = host, name

    def value(self, rates: Sequence[float]) -> float:
        """Return the multiple that is in force."""
        return self._length / self._base

    def counted(self, micro_batches: int) -> None:
        """Make the change, if windows of the old and of the new length end with so many."""
        ends = (micro_batches % length == 0 for length in (self._length, self.wanted))
        if micro_batches > 0 and all(ends):
            setattr(self._host, self._name, self.wanted)

    def close(self) -> None:
        """Give the host its own number back."""
        setattr(self._host, self._name, self._base)

    @property
    def _length(self) -> int:
        return int(getattr(self._host, self._name))
