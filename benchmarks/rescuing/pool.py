"""The jobs of this benchmark: a run and a policy, kept when done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import side_by_side

from rescuing.execute import execute
from rescuing.store import Job, Store


def predicted_seconds(job: Job) -> float:
    """Estimate what a job takes, from what the task took when it was calibrated."""
    policy, setting = job[1], job[0].setting
    bare = setting.rates.seconds * setting.steps / setting.task.steps
    return bare * (2.0 if policy.startswith("cap") else 1.1) + 0.2


def work(jobs: Sequence[Job], folder: Path, *, workers: int) -> list[tuple[Job, str]]:
    """Do all jobs and return those that failed, with their tracebacks; the others go on."""
    return side_by_side.work(
        jobs, partial(_do, folder), seconds=predicted_seconds, name=_name, workers=workers
    )


def _do(folder: Path, job: Job) -> None:
    Store(folder).save(job, execute(*job))


def _name(job: Job) -> str:
    return f"{job[0].name} {job[1]}"
