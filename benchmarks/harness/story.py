"""A run as it is read back, with what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tasks.task import EVERY
from tqdm import tqdm

from harness.outcome import DIVERGED, Outcome, judge
from harness.run import Run
from harness.store import Job, Store


@dataclass(frozen=True)
class Cost:
    """Shares of the bare training time of a run, which is forward, backward and optimizer.

    `steady` is that of the probes after the first 10 % of the steps: what a long run converges to.
    """

    total: float
    steady: float
    grad_norms: float


@dataclass
class Story:
    """One run under one policy. `losses[t]` is known before step t is taken."""

    run: Run
    policy: str
    data: dict[str, Any]
    scores: dict[str, Any] = field(default_factory=dict)  # of detectors, computed once

    @property
    def losses(self) -> list[float]:
        return self.data["losses"]

    @property
    def grad_norms(self) -> list[float]:
        return self.data["grad_norms"]

    @property
    def alerts(self) -> list[dict[str, Any]]:
        return self.data["alerts"]

    @property
    def loss(self) -> float:
        """The mean training loss of its last steps."""
        return math.inf if self.data["tail"] is None else self.data["tail"]

    @property
    def accuracy(self) -> float:
        """On held-out data; 0 of a model that ended in NaN, or of a task without right answers."""
        found = self.data["evaluation"]
        return (found["accuracy"] or 0.0) if found else 0.0

    @property
    def left(self) -> float:
        """The share of what can be learnt that is left at the end."""
        return self.run.rates.lost(self.loss)

    @property
    def diverged(self) -> bool:
        return not self.left < DIVERGED

    @property
    def scales(self) -> list[float]:
        """The rate of each step over the schedule's."""
        pairs = zip(self.data["taken"], self.data["rates"], strict=True)
        return [round(taken / planned, 5) if planned else 1.0 for taken, planned in pairs]

    @property
    def course(self) -> list[float]:
        """How good the model is at each step: its scores, where the loss does not tell."""
        scores = self.data.get("scores")
        return [scores[t // EVERY] for t in range(len(self.losses))] if scores else self.losses

    @cached_property
    def outcome(self) -> Outcome:
        """Judged anew from the losses whenever a story is read."""
        run = self.run
        return judge(
            self.course,
            run.rates,
            items=run.task.items(run.recipe.batch),
            left=self.left,
            from_start=run.scenario == "start",
            multiple=run.multiple,
        )

    @cached_property
    def cost(self) -> Cost:
        seconds, steps = self.data["seconds"], len(self.losses)
        bare = max(seconds["bare"], 1e-9)
        young = 0.1 * steps
        late = sum(r["seconds"] for r in self.data.get("records", ()) if r["step"] >= young)
        return Cost(
            total=seconds["policy"] / bare,
            steady=late / (bare * 0.9),
            grad_norms=seconds["grad_norms"] / bare,
        )

    def measured(self, quantity: str) -> dict[int, float]:
        """Return what probes have measured of a quantity, by step; held values are left out."""
        found = {}
        for record in self.data["records"]:
            estimate = record["estimates"].get(quantity)
            if estimate and estimate["value"] is not None and not estimate["age"]:
                found[record["step"]] = estimate["value"]
        return found


def read(store: Store, jobs: Iterable[Job]) -> list[Story]:
    """Read what is there of these jobs."""
    found = []
    for run, policy in tqdm(list(jobs), desc="reading", leave=False):
        data = store.load(run, policy)
        if data is not None:
            found.append(Story(run, policy, data))
    return found
