"""Trainings done one beside the other, the longest first, each on one thread."""

from __future__ import annotations

import functools
import hashlib
import logging
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

import geomwatch

Job = TypeVar("Job")


def work(
    jobs: Sequence[Job],
    do: Callable[[Job], None],
    *,
    seconds: Callable[[Job], float],
    name: Callable[[Job], str],
    workers: int,
) -> list[tuple[Job, str]]:
    """Do all jobs and return those that failed, with their tracebacks; the others go on.

    `do` keeps what comes of a job and can be pickled; `seconds` are what a job is expected to take.
    One worker is this process itself.
    """
    ordered = sorted(jobs, key=seconds, reverse=True)
    failures: list[tuple[Job, str]] = []
    form = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}"
    total = sum(map(seconds, jobs)) * (1 + 1e-9)  # rounding must not fill the bar too early
    with tqdm(total=total, bar_format=form, disable=not jobs) as bar:
        for number, (job, error) in enumerate(_results(ordered, do, workers), 1):
            if error:
                failures.append((job, error))
            bar.set_postfix_str(f"{number}/{len(jobs)} {name(job)}", refresh=False)
            bar.update(seconds(job))
    return failures


def _results(
    jobs: Sequence[Job], do: Callable[[Job], None], workers: int
) -> Iterator[tuple[Job, str]]:
    if workers == 1:
        prepare()
        for job in jobs:
            yield job, _attempt(do, job)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=prepare) as pool:
        pending = {pool.submit(_attempt, do, job): job for job in jobs}
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


def _attempt(do: Callable[[Job], None], job: Job) -> str:
    try:
        do(job)
    except Exception:  # told, so that the other runs go on
        return traceback.format_exc()
    return ""


@functools.cache
def code() -> str:
    """Return a hash of geomwatch's sources; reports say when runs differ in it."""
    digest = hashlib.sha256()
    for path in sorted(Path(geomwatch.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
