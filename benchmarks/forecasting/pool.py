"""Runs done one beside the other, the longest first, each on one thread."""

from __future__ import annotations

import logging
import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch
from tqdm import tqdm

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
    ordered = sorted(jobs, key=predicted_seconds, reverse=True)
    failures: list[tuple[Job, str]] = []
    total = sum(map(predicted_seconds, jobs))
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    with tqdm(total=total, bar_format=form, disable=not jobs) as bar:
        for number, (job, error) in enumerate(_results(ordered, folder, workers), 1):
            if error:
                failures.append((job, error))
            bar.set_postfix_str(f"{number}/{len(jobs)} {job[0].name} {job[1]}", refresh=False)
            bar.update(predicted_seconds(job))
    return failures


def _results(jobs: Sequence[Job], folder: Path, workers: int) -> Iterator[tuple[Job, str]]:
    if workers == 1:
        _prepare()
        for job in jobs:
            yield job, _do(job, folder)
        return
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
    run, policy = job
    try:
        Store(folder).save(run, policy, execute(run, POLICIES[policy]))
    except Exception:  # told, so that the other runs go on
        return traceback.format_exc()
    return ""
