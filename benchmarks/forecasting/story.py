"""A run as the detectors see it, with what became of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tqdm import tqdm

from forecasting.grid import Run
from forecasting.outcome import Outcome, judge
from forecasting.store import Store


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

    @cached_property
    def outcome(self) -> Outcome:
        """Judged anew from the losses whenever a story is read."""
        run = self.run
        return judge(
            self.losses,
            run.rates,
            items=run.task.items(run.recipe.batch),
            left=self.data["left"],
            from_start=run.scenario == "start",
            multiple=run.multiple,
        )

    @cached_property
    def cost(self) -> Cost:
        seconds, steps = self.data["seconds"], len(self.losses)
        bare = max(seconds["bare"], 1e-9)
        young = 0.1 * steps
        late = sum(r["seconds"] for r in self.data["records"] if r["step"] >= young)
        return Cost(
            total=seconds["monitor"] / bare,
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


def read(store: Store, runs: Iterable[Run], policy: str) -> list[Story]:
    """Read what is there of these runs."""
    found = []
    for run in tqdm(list(runs), desc=f"reading {policy}", leave=False):
        data = store.load(run, policy)
        if data is not None:
            found.append(Story(run, policy, data))
    return found
