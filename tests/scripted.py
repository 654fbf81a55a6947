"""A controller that does what a test says, shared by the tests of control and of hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from geomwatch.controllers import Move
from geomwatch.rules import Observation


class Scripted:
    """Wants its knob at `moves[step]` before that step; keeps what it was shown."""

    def __init__(self, knob: str, moves: dict[int, float] | None = None, **options: Any) -> None:
        self.knob, self.moves, self.options = knob, moves or {}, options
        self.seen: list[Any] = []

    def __call__(self, seen: Observation, alerts: Sequence[Any], knobs: Any) -> Sequence[Move]:
        self.seen.append((seen, alerts, knobs))
        if seen.index not in self.moves:
            return ()
        return [Move(self.knob, self.moves[seen.index], "the test wants it", **self.options)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
