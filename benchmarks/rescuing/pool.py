"""Jobs done one beside the other, the longest first, each on one thread."""

from __future__ import annotations

import logging
import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

from rescuing.execute import execute
from rescuing.store import Job, Store


def predicted_seconds(job: Job) -> float:
    """Estimate what a job takes, from what the task took when it was calibrated."""
    policy, setting = job[1], job[0].setting
    bare = setting.rates.seconds * setting.steps / setting.task.steps
    return bare * (2.0 if policy.startswith("cap") else 1.1) + 0.2


def work(jobs: Sequence[Job], folder: Path, *, workers: int) -> list[tuple[Job, str]]:
    """Do all jobs and return those that failed, with their tracebacks; the others go on."""
    ordered = sorted(jobs, key=predicted_seconds, reverse=True)
    failures: list[tuple[Job, str]] = []
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=sum(map(predicted_seconds, jobs)), bar_format=form, disable=not jobs) as bar:
        for number, (job, error) in enumerate(_results(ordered, folder, workers), 1):
            if error:
                failures.append((job, error))
            bar.set_postfix_str(f"{number}/{len(jobs)} {job[0].name} {job[1]}", refresh=False)
            bar.update(predicted_seconds(job))
    return failures


def _results(jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[tuple[Job, str]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare) as pool:
        pending = {pool.submit(_do, job, folder): job for job in jobs}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _prepare() -> None:
    """One thread for torch: runs side by side must not fight over the cores."""
    torch.set_num_threads(1)
    logging.getLogger("geomwatch").setLevel(logging.CRITICAL + 1)


def _do(job: Job, folder: Path) -> str:
    try:
        Store(folder).save(job, execute(*job))
    except Exception:  # told, so that the other runs go on
        return traceback.format_exc()
    return ""
