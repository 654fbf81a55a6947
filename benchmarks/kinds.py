"""Do the warnings hold on kinds of runs that nobody has tuned them for?

Trains small runs of ten kinds, healthy and failing, with a monitor at its defaults beside each.
Levels may be chosen on the development set; validation is read at the end of an attempt. Each run
is kept as soon as it is done, so that the whole can be stopped and started again. With `--before`
the runs of another version, in a folder of their own, stand beside those of this one. Writes
docs/benchmarks/kinds.md.

    python benchmarks/kinds.py                        # what is missing, then the report in docs/
    python benchmarks/kinds.py run --set development  # one of the two sets
    python benchmarks/kinds.py report --before DIR    # from the runs there are
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import grid
from harness.detectors import geomwatch
from harness.policies import DEFAULT
from harness.program import Options, Question, written
from harness.run import Run
from harness.store import Job, Store
from harness.story import Story, read
from harness.tables.kinds import by_kind, summary


class Kinds(Question):
    """Do the warnings hold on kinds of runs that nobody has tuned them for?"""

    name = "kinds"
    usage = __doc__

    def options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--set", choices=("development", "validation"), help="one set alone")
        parser.add_argument("--before", type=Path, help="runs of another version")

    def jobs(self, options: Options) -> list[Job]:
        return [(run, DEFAULT) for run in _runs(options)]

    def report(self, options: Options, store: Store, out: Path) -> str | None:
        runs = _runs(options)
        now = read(store, [(run, DEFAULT) for run in runs])
        if not now:
            return None
        before = read(Store(options.before), [(r, DEFAULT) for r in runs]) if options.before else []
        return page(now, _same(before, now), written(self.name, now, len(runs)))


def _runs(options: Options) -> list[Run]:
    parts = (options.set,) if options.set else ("development", "validation")
    runs = [run for part in parts for run in grid.kinds(part)]
    return [r for r in runs if options.only in r.name][: 4 if options.quick else None]


def _same(before: Sequence[Story], now: Sequence[Story]) -> list[Story]:
    """Keep the runs that there are of both."""
    names = {story.run.name for story in now}
    return [story for story in before if story.run.name in names]


def page(now: Sequence[Story], before: Sequence[Story], head: str) -> str:
    """Return the whole report."""
    commits = ", ".join(sorted({s.data["commit"] for s in before}))
    said = f" The column *before* is of commit {commits}, the same runs." if before else ""
    return f"""# Warnings on many kinds of runs

{head}

Ten tasks of as many kinds (`benchmarks/tasks`) that no level had been chosen on, SGD with momentum
0.9 and Adam, defaults, 300 steps or so. What counts as failed and healthy is fixed by losses or
scores alone (`benchmarks/harness/outcome.py`). A ramp is hidden where the optimizer does not show
its end. Announced means: by a warning or a critical alert before the loss blows up. Intervals are
95 % (Clopper-Pearson).{said}

{summary(now, before, geomwatch)}

## By task

Healthy runs that were warned, and failing ones that were announced in time.

{by_kind(now, before, geomwatch)}
"""


if __name__ == "__main__":
    sys.exit(Kinds().main())
