"""Trainings done one beside the other, the longest first, each on one thread and kept when done."""

from __future__ import annotations

import logging
import multiprocessing
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

import torch
from tqdm import tqdm

from harness.execute import execute
from harness.policies import named
from harness.store import Job, Store


def predicted_seconds(job: Job) -> float:
    """Estimate what a job takes, from what the task took when it was calibrated."""
    run, policy = job
    bare = run.rates.seconds * run.recipe.steps / run.task.steps
    return bare * (1 + named(policy).costs) + 0.2


def work(jobs: Sequence[Job], store: Store, *, workers: int) -> list[tuple[Job, str]]:
    """Do all jobs and return those that failed, with their tracebacks; the others go on.

    One worker is this process itself.
    """
    seconds = {job: predicted_seconds(job) for job in jobs}
    ordered = sorted(jobs, key=seconds.__getitem__, reverse=True)
    failures: list[tuple[Job, str]] = []
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    total = sum(seconds.values()) * (1 + 1e-9)  # rounding must not fill the bar too early
    with tqdm(total=total, bar_format=form, disable=not jobs) as bar:
        for number, (job, error) in enumerate(_results(ordered, store, workers), 1):
            if error:
                failures.append((job, error))
            bar.set_postfix_str(f"{number}/{len(jobs)} {job[0].name} {job[1]}", refresh=False)
            bar.update(seconds[job])
    return failures


def _results(jobs: Sequence[Job], store: Store, workers: int) -> Iterator[tuple[Job, str]]:
    if workers == 1:
        prepare()
        for job in jobs:
            yield job, _attempt(store, job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare) as pool:
        pending = {pool.submit(_attempt, store, job): job for job in jobs}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    yield pending.pop(future), future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare() -> None:
    """One thread for torch: runs side by side must not fight over the cores. And no log."""
    torch.set_num_threads(1)
    logging.getLogger("geomwatch").setLevel(logging.CRITICAL + 1)


def _attempt(store: Store, job: Job) -> str:
    try:
        store.save(*job, execute(*job))
    except Exception:  # told, so that the other runs go on
        return traceback.format_exc()
    return ""
