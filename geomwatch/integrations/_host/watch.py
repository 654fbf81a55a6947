"""One optimizer of a host's run, watched: what is alike in every host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from geomwatch.errors import UsageError
from geomwatch.integrations._host.loss import HostLoss, MicroBatch, Unknown
from geomwatch.monitoring.monitor import STATE, Monitor
from geomwatch.parallel.ranks import Ranks
from geomwatch.records import Alert, Look, Record
from geomwatch.sinks.log import logger

L = TypeVar("L", bound=HostLoss)


class HostWatch(Generic[L]):
    """Feeds a monitor the windows of an optimizer's steps, and hands on what it finds."""

    def __init__(self, monitor: Monitor, loss: L, ranks: Ranks) -> None:
        self.monitor, self.loss, self.ranks = monitor, loss, ranks
        self.is_checked = False  # against training
        self._alerts_seen = self._looks_seen = 0
        self._said: set[str] = set()

    def go_on_from(self, state: Any, step: int) -> None:
        """Go on from a checkpoint's state, or without one from `step`.

        Raises:
            UsageError: it is damaged, or of another model, other rules or controllers.
        """
        if isinstance(state, Mapping) and state.get("version") != STATE:
            logger.warning(
                "what the checkpoint holds of geomwatch is from another version of it, so that its "
                "rules and controllers start afresh."
            )
            state = None
        if state is None:
            self.monitor.start_at(step)
        else:
            self.monitor.load_state_dict(state)

    def check_once(self, check: Callable[[], None]) -> None:
        """At the first step, make sure that a probe measures the loss trained on.

        All ranks call it at once. A check that fails otherwise than by a verdict costs no training.

        Raises:
            UsageError: it would measure another loss, on this rank or on another.
        """
        self.is_checked = True
        try:
            with self.ranks.refused_together():
                check()
        except UsageError:
            raise
        except Exception as error:  # a probe will say more, and training goes on
            logger.warning(
                "whether the loss measured is the loss trained on could not be checked: %s: %s",
                type(error).__name__,
                error,
            )

    def watch_step(
        self,
        window: Sequence[MicroBatch] | str,
        *,
        loss: Tensor | float | None,
        grad_norm: Tensor | float | None,
        grad_scale: float = 1.0,
    ) -> Record | None:
        """Watch the coming step, on a window or on the reason why it can't be evaluated again."""
        if not isinstance(window, str):
            for micro in window:
                self.monitor.observe(micro)
        elif self.ranks.size > 1:
            self.monitor.observe(Unknown(window))
        return self.monitor.step(loss=loss, grad_norm=grad_norm, grad_scale=grad_scale)

    def new_alerts(self) -> list[Alert]:
        """Return the alerts since the last call."""
        seen, self._alerts_seen = self._alerts_seen, len(self.monitor.alerts)
        return self.monitor.alerts[seen:]

    def new_looks(self) -> list[Look]:
        """Return what was seen along steps since the last call."""
        seen, self._looks_seen = self._looks_seen, len(self.monitor.looks)
        return self.monitor.looks[seen:]

    def say_once(self, message: str, *, about: str = "") -> None:
        """Warn of something, once; `about` tells it from others where the words vary."""
        key = about or message
        if key not in self._said:
            self._said.add(key)
            logger.warning(message)

    def close(self) -> None:
        """Judge the last step and leave the optimizer as it was; the history stays."""
        self.monitor.close()
