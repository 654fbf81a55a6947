"""Runs with clipped gradients, judged by their losses alone, and what was warned of in each."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from changing.hosts import train
from changing.net import CLASSES, TOKENS, Net
from changing.run import Case, Run

STEPS = 200
_LAST = 20  # steps whose losses are the end of a run
HEALTHY, FAILED = 1 / 5, 1 / 3  # of what can be learnt, left at the end: as in harness/outcome.py

CLIPS = (None, 0.05, 0.2, 1.0)
Verdict = Literal["healthy", "failed", "neither"]


class Deep(nn.Module):
    """Four layers with ReLUs, wider than `Net`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, 8)
        widths = [8, 32, 32, 32]
        pairs = itertools.pairwise(widths)
        self.body = nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b), nn.ReLU())])
        self.head = nn.Linear(32, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens).mean(1)))


NETS: dict[str, Callable[[], nn.Module]] = {"tanh": Net, "ReLU": Deep}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "AdamW": torch.optim.AdamW,
}
RATES: dict[str, tuple[float, ...]] = {
    "SGD": (0.5, 2.0, 8.0, 32.0, 128.0),
    "momentum": (0.05, 0.2, 0.8, 3.2, 12.8),
    "AdamW": (0.003, 0.01, 0.03, 0.1, 0.5),
}


@dataclass(frozen=True, slots=True)
class Clipped:
    """A run at a constant rate."""

    net: str
    optimizer: str
    rate: float
    clip: float | None
    host: str = "raw"


class ClippedRun(Run):
    """It trains without a change, and keeps what it was warned of."""

    steps = STEPS

    def __init__(self, clipped: Clipped) -> None:
        case = Case("another rate", clip=clipped.clip, host=clipped.host)
        super().__init__(case)
        self.net = NETS[clipped.net]()
        self.optimizer = OPTIMIZERS[clipped.optimizer](self.net.parameters(), lr=clipped.rate)
        self.alerts: list[Any] = []

    @property
    def options(self) -> dict[str, Any]:
        """What a monitor is given: nothing but where alerts go."""
        return {"on_alert": self.alerts.append}

    def change_before(self, step: int, into: Callable[[Any], Any] = lambda made: made) -> bool:
        """Change nothing."""
        return False


@cache
def losses(clipped: Clipped) -> tuple[float, ...]:
    """Return the loss of each step, trained without a monitor."""
    run = ClippedRun(clipped)
    train(run, watched=False)
    return tuple(run.tape.losses)


def left(clipped: Clipped) -> float:
    """Return the share of what can be learnt that is left at the end.

    What can be learnt lies between the first loss and the lowest end of all rates and clips.
    """
    ladder = [run for clip in CLIPS for run in _rates(replace(clipped, clip=clip))]
    best = min(map(_end, ladder))
    return (_end(clipped) - best) / (losses(ladder[0])[0] - best)


def verdict(clipped: Clipped) -> Verdict:
    """Tell what became of a run, by losses alone; no rate is too high below the best one."""
    share = left(clipped)
    best = min(_rates(clipped), key=_end)
    if share < HEALTHY:
        return "healthy"
    return "failed" if share > FAILED and clipped.rate > best.rate else "neither"


def alerts(clipped: Clipped) -> list[str]:
    """Return what a monitor with default options warns of, without what is for information."""
    run = ClippedRun(clipped)
    train(run, watched=True)
    loud = [alert for alert in run.alerts if alert.severity != "info"]
    return [f"{a.rule} {a.severity} at {a.step}" for a in loud]


def _rates(clipped: Clipped) -> list[Clipped]:
    return [replace(clipped, rate=rate) for rate in RATES[clipped.optimizer]]


def _end(clipped: Clipped) -> float:
    last = losses(replace(clipped, host="raw"))[-_LAST:]
    return statistics.fmean(last) if all(map(math.isfinite, last)) else math.inf
