"""One training with a monitor beside it, and all that later questions may need of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tasks.training import Loop, Trace, prepare, tail, train
from torch import Tensor

import geomwatch
from forecasting.advice import Obedience
from forecasting.codec import encode
from forecasting.grid import Run
from forecasting.policies import Policy
from geomwatch.records import Alert
from geomwatch.rules import Observation, default_rules
from geomwatch.sinks import record_line

_ATTEMPTS = 4  # a user has so much patience


class StartAgain(Exception):  # noqa: N818 (it is no error)
    """An alert has said so; `caps` are the rates not to exceed."""

    def __init__(self, caps: Sequence[tuple[int, float]]) -> None:
        super().__init__(caps)
        self.caps = caps


class Recorder:
    """A rule without a verdict: it keeps what all rules were shown.

    Each with the step of the loop `at` which it was shown, since rules also see a step again.
    """

    name = "recorder"

    def __init__(self) -> None:
        self.at = 0
        self.seconds = 0.0  # that the monitor is not to be charged with
        self.seen: list[dict[str, Any]] = []

    def __call__(self, seen: Observation) -> None:
        """Keep one step."""
        start = time.perf_counter()
        self.seen.append({"at": self.at, "seen": encode(seen)})
        self.seconds += time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: it remembers for the benchmark, not for the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over nothing."""


@dataclass
class Watch:
    """A monitor as a user would have it, its wall time, and at which steps it spoke.

    `raised` of an alert is the step before which the loop hears of it. That may be later than the
    alert's own `step`, which is the one that it is about.
    """

    loop: Loop
    policy: Policy
    recorder: Recorder = field(default_factory=Recorder)
    caps: Sequence[tuple[int, float]] = ()  # that earlier attempts have learnt
    is_last: bool = True  # attempt
    alerts: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        follows = self.policy.follows
        self.obedience = Obedience(self.loop.optimizer, self.caps) if follows else None
        start = time.perf_counter()
        self.monitor = geomwatch.Monitor(
            self.loop.model,
            self.loop.task.loss_fn,
            self.loop.optimizer,
            rules=[*default_rules(), self.recorder],
            on_alert=self._hear,
            **self.policy.options,
        )
        self.seconds += time.perf_counter() - start

    def __call__(self, step: int, batch: Any, loss: Tensor) -> None:
        """Watch a step before it is taken."""
        self.recorder.at = step
        self._obey()
        start = time.perf_counter()
        self.monitor.step(batch, loss=loss)
        self.seconds += time.perf_counter() - start
        self._obey()  # an alert before a step concerns that step already
        self._start_again()

    def close(self) -> None:
        """Let the monitor judge the last step."""
        self.recorder.at += 1
        start = time.perf_counter()
        self.monitor.close()
        self.seconds += time.perf_counter() - start
        self._start_again()

    def _hear(self, alert: Alert) -> None:
        heard = heard_at(self.recorder.at, alert)
        self.alerts.append(heard)
        if self.obedience is not None:
            self.obedience.hear(self.recorder.at, heard)

    def _start_again(self) -> None:
        if self.obedience is not None and self.obedience.wants_again and not self.is_last:
            raise StartAgain(self.obedience.caps)

    def _obey(self) -> None:
        if self.obedience is not None:
            self.obedience.apply()


def heard_at(step: int, alert: Alert) -> dict[str, Any]:
    """Return an alert as plain data, with the step at which the loop hears of it."""
    return {**encode(asdict(alert)), "raised": step}


def execute(run: Run, policy: Policy) -> dict[str, Any]:
    """Train once under a policy and return the story as plain data.

    Who follows an alert that says to start again does so, a few times at most, with the same
    batches; the story is that of the last attempt.
    """
    caps: Sequence[tuple[int, float]] = ()
    for attempt in range(_ATTEMPTS):
        loop = prepare(run.task, run.recipe)
        watch = Watch(loop, policy, caps=caps, is_last=attempt == _ATTEMPTS - 1)
        try:
            trace = train(loop, run.recipe, watch)
            watch.close()
            break
        except StartAgain as again:
            caps = again.caps
    left = run.rates.lost(tail(trace, run.task.items(run.recipe.batch)))
    return {
        "losses": trace.losses,
        "grad_norms": trace.grad_norms,
        "rates": trace.rates,
        "seconds": _seconds(trace, watch),
        "left": left,
        "evaluation": _evaluation(run, loop, trace),
        "alerts": watch.alerts,
        "attempts": attempt + 1,
        "caps": watch.obedience.caps if watch.obedience is not None else [],
        "records": [record_line(record) for record in watch.monitor.history],
        "observations": watch.recorder.seen,
    }


def _seconds(trace: Trace, watch: Watch) -> dict[str, float]:
    return {
        "bare": trace.seconds,
        "monitor": watch.seconds - watch.recorder.seconds,
        "probes": watch.monitor.probe_seconds,
        "grad_norms": trace.norm_seconds,
    }


def _evaluation(run: Run, loop: Loop, trace: Trace) -> dict[str, float] | None:
    if not math.isfinite(trace.losses[-1]):
        return None
    return {**asdict(run.task.evaluate(loop.model)), "train": run.task.train_loss(loop.model)}
