"""Compute what is missing, with a bar, and keep a log of what each piece has cost."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from studies.schedule import Piece
from studies.store import Store

LOG = "log.txt"
_NOTABLE = 0.05  # seconds: less is a piece that was there already

logger = logging.getLogger("study")


def compute(store: Store, pieces: Iterable[Piece]) -> None:
    """Compute each piece that is not there yet; Ctrl-C loses the one in progress only."""
    todo = list(pieces)
    store.folder.mkdir(parents=True, exist_ok=True)
    columns = (
        TextColumn("{task.description:45.45}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, transient=True) as bar, (store.folder / LOG).open("a") as log:
        task = bar.add_task("", total=len(todo))
        for piece in todo:
            bar.update(task, description=piece.name)
            wall, processor = time.perf_counter(), time.process_time()
            piece.compute()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            if wall > _NOTABLE:
                now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
                log.write(f"{now} {piece.name}: {wall:.1f} s, {processor:.1f} s of CPU\n")
                log.flush()
            bar.advance(task)


def spent(store: Store) -> tuple[float, float]:
    """Return the seconds that all pieces together took, and those of CPU time."""
    wall = processor = 0.0
    for line in (store.folder / LOG).read_text(encoding="utf-8").splitlines():
        numbers = line.rsplit(": ", 1)[1].split(" ")
        wall, processor = wall + float(numbers[0]), processor + float(numbers[2])
    return wall, processor
