"""The jobs of this benchmark: a run and a policy, kept when done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import side_by_side

from forecasting.execute import execute
from forecasting.grid import Run
from forecasting.policies import POLICIES
from forecasting.store import Store

Job = tuple[Run, str]  # a run and a policy

_START_UP = 120  # steps that the first probe of a run costs


def predicted_seconds(job: Job) -> float:
    """Estimate what a job takes, from what the task took when it was calibrated."""
    run, policy = job
    bare = run.rates.seconds
    return bare * (1 + POLICIES[policy].costs + _START_UP / run.recipe.steps) + 0.2


def work(jobs: Sequence[Job], folder: Path, *, workers: int) -> list[tuple[Job, str]]:
    """Do all jobs and return those that failed, with their tracebacks; the others go on."""
    return side_by_side.work(
        jobs, partial(_do, folder), seconds=predicted_seconds, name=_name, workers=workers
    )


def _do(folder: Path, job: Job) -> None:
    run, policy = job
    Store(folder).save(run, policy, execute(run, POLICIES[policy]))


def _name(job: Job) -> str:
    return f"{job[0].name} {job[1]}"
