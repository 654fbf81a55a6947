"""When a probe is due: from steps, learning rates and measured margins, never from the clock."""

from __future__ import annotations

from typing import Any

from geomwatch.errors import UsageError

_DENSE_START = (0, 1, 2, 3, 5, 8)
_CLOSE, _WIDE = 10, 20  # steps between sentinels: the first
_YOUNG = 100  # steps, and while a margin is above _CALM; then
_GROWTH = 1.6  # of the interval, after the dense start and after an approach that came to nothing
_CALM = 0.25  # margins below this need no attention: half the lowest warning level
_RISE, _RISKY_RISE = 1.5, 1.15  # of the learning rate, across which no held margin is trusted


class FixedSchedule:
    """A probe every `every` steps, from step 0: exactly ceil(steps / every) of them."""

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, step: int, *, lr_ratio: float, margin: float | None) -> bool:
        """Tell whether to probe before this step."""
        return step % self.every == 0

    def probed(self, step: int, *, margin: float | None) -> None:
        """Take note of a probe and the margin it measured."""

    def glance_due(self, step: int, *, lr_ratio: float, margin: float | None) -> bool:
        """Tell whether a sentinel is due where no probe is: never at a fixed interval."""
        return False

    def glanced(self, step: int, *, margin: float | None) -> None:
        """Take note of a sentinel and the margin it measured."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""


class AdaptiveSchedule(FixedSchedule):
    """Dense when it matters: at the start, while the rate rises, while the margin approaches 1.

    Probes at steps 0, 1, 2, 3, 5, 8, then at intervals that grow by 1.6 from 15 up to `every`, and
    sentinels in between: every 10 steps up to step 100 and while the margin is above 0.25, else
    every 20. A rise of the learning rate by more than half since the last probe, by 15 % while
    the margin is above 0.25, makes a probe due at once. A margin above 0.25 that has risen by 10 %
    since the last probe shortens the interval, to every / 10 at the first warning level of 0.5 and
    every / 20 from 0.6; a margin that holds still lets it grow back.
    """

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self._next = 0
        self._interval = 1.0
        self._margin: float | None = None
        self._glance = 0  # the step of the next sentinel

    def glance_due(self, step: int, *, lr_ratio: float, margin: float | None) -> bool:
        """Tell whether a sentinel is due where no probe is; `lr_ratio` is that since the last."""
        return step >= self._glance or lr_ratio > _RISKY_RISE

    def glanced(self, step: int, *, margin: float | None) -> None:
        """Choose the next step of a sentinel."""
        start = next((s for s in _DENSE_START if s > step), None)
        close = step < _YOUNG or (margin is not None and margin > _CALM)
        self._glance = start or step + (_CLOSE if close else _WIDE)

    def due(self, step: int, *, lr_ratio: float, margin: float | None) -> bool:
        """Tell whether to probe; `lr_ratio` is the lr now over that of the last probe."""
        risky = margin is not None and margin > _CALM
        return step >= self._next or lr_ratio > (_RISKY_RISE if risky else _RISE)

    def probed(self, step: int, *, margin: float | None) -> None:
        """Take note of a probe and choose the next step."""
        rising = margin is not None and (self._margin is None or margin > 1.1 * self._margin)
        self._margin = margin
        self.glanced(step, margin=margin)
        start = next((s for s in _DENSE_START if s > step), None)
        if start is not None:
            self._next = min(start, step + self.every)
            return
        interval = max(self._interval * _GROWTH, 15.0)
        if rising and margin is not None and margin > _CALM:
            # (0.25 / margin)^3.4 is 1/20 at 0.6
            interval = min(interval, self.every * (_CALM / margin) ** 3.4)
        self._interval = min(max(interval, self.every / 20, 1.0), self.every)
        self._next = step + max(1, round(self._interval))

    def state_dict(self) -> dict[str, Any]:
        """Return the next step, the interval and the last margin."""
        return {
            "next": self._next,
            "interval": self._interval,
            "margin": self._margin,
            "glance": self._glance,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over where another schedule stopped."""
        self._next, self._interval = state["next"], state["interval"]
        self._margin, self._glance = state["margin"], state["glance"]


def make_schedule(kind: str, every: int) -> FixedSchedule:
    """Return the schedule of that name.

    Raises:
        UsageError: `every` is not a positive integer, or the name is unknown.
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise UsageError(
            f"every must be an integer >= 1, got {every!r}. It is the number of optimizer steps "
            "between two probes of a calm run; 100 is a good start."
        )
    if kind == "adaptive":
        return AdaptiveSchedule(every)
    if kind == "fixed":
        return FixedSchedule(every)
    raise UsageError(f'schedule must be "adaptive" or "fixed", got {kind!r}.')
