"""A monitor beside the training, as a user would have it; and a user who follows its advice."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tasks.sources import Batch
from tasks.training import Loop
from torch import Tensor

import geomwatch
from geomwatch.controllers import Controller
from geomwatch.records import Alert
from geomwatch.rules import Observation, default_rules
from geomwatch.sinks.lines import record_line
from harness.advice import Obedience
from harness.codec import encode
from harness.policy import StartAgain

_ATTEMPTS = 4  # a user has so much patience


class Recorder:
    """A rule without a verdict: it keeps what all rules were shown.

    Each with the step of the loop `at` which it was shown, since rules also see a step again.
    """

    name = "recorder"

    def __init__(self) -> None:
        self.at = 0
        self.seconds = 0.0
        self.seen: list[dict[str, Any]] = []

    def __call__(self, seen: Observation) -> None:
        """Keep one step."""
        start = time.perf_counter()
        self.seen.append({"at": self.at, "seen": encode(seen)})
        self.seconds += time.perf_counter() - start


class Watch:
    """A monitor; `options` are its own.

    It keeps alerts, records, and what the rules were shown, unless it is not to `observe`: that is
    the bulk. `raised` of an alert is the step before which the loop hears of it. That may be later
    than the alert's own `step`, which is the one that it is about.
    """

    def __init__(
        self,
        loop: Loop,
        *,
        controllers: Sequence[Controller] = (),
        observe: bool = True,
        **options: Any,
    ) -> None:
        self.loop = loop
        self.recorder = Recorder()
        self.alerts: list[dict[str, Any]] = []
        self.monitor = geomwatch.Monitor(
            loop.model,
            loop.task.loss_fn,
            loop.optimizer,
            rules=[*default_rules(), *([self.recorder] if observe else [])],
            controllers=controllers,
            on_alert=self.hear,
            **options,
        )

    @property
    def uncharged(self) -> float:
        return self.recorder.seconds

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Watch a step before it is taken."""
        self.recorder.at = step
        self.monitor.step(batch, loss=loss)

    def close(self) -> None:
        """Let the monitor judge the last step."""
        self.recorder.at += 1
        self.monitor.close()

    def hear(self, alert: Alert) -> None:
        self.alerts.append(heard_at(self.recorder.at, alert))

    def facts(self) -> dict[str, Any]:
        return {
            "alerts": self.alerts,
            "adjustments": [[a.step, a.knob, a.after] for a in self.monitor.adjustments],
            "records": [encode(record_line(r)) for r in self.monitor.history],
            "observations": self.recorder.seen,
        }


class Follower(Watch):
    """A user who lowers the rate as soon as an alert says so, and starts again when told to.

    `caps` are what earlier attempts have learnt: (step, rate) of each time the rate went down.
    """

    def __init__(
        self, loop: Loop, *, caps: Sequence[tuple[int, float]] = (), attempt: int = 1
    ) -> None:
        self.attempt = attempt
        self.obedience = Obedience(loop.optimizer, caps)
        super().__init__(loop)

    def __call__(self, step: int, batch: Batch, loss: Tensor) -> None:
        """Watch a step, which an alert before it concerns already."""
        self.obedience.apply()
        super().__call__(step, batch, loss)
        self.obedience.apply()
        self._start_again()

    def close(self) -> None:
        """Let the monitor judge the last step, and start again if that says so."""
        super().close()
        self._start_again()

    def hear(self, alert: Alert) -> None:
        super().hear(alert)
        self.obedience.hear(self.recorder.at, self.alerts[-1])

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "attempts": self.attempt, "caps": self.obedience.caps}

    def _start_again(self) -> None:
        if self.obedience.wants_again and self.attempt < _ATTEMPTS:
            caps, attempt = self.obedience.caps, self.attempt + 1
            raise StartAgain(lambda loop: Follower(loop, caps=caps, attempt=attempt))


def heard_at(step: int, alert: Alert) -> dict[str, Any]:
    """Return an alert as plain data, with the step at which the loop hears of it."""
    return {**encode(asdict(alert)), "raised": step}
