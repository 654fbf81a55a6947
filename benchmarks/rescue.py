"""Does the learning-rate cap rescue runs whose rate is too high, and leave the others alone?

Trains real nets from multiples of their tuned rate, without control, with geomwatch's cap, and with
what people use instead. Each outcome is kept as soon as it is there, so that the whole can be
stopped and started again. Writes docs/benchmarks/rescue.md.

    python benchmarks/rescue.py                # what is missing of the small nets, then the report
    python benchmarks/rescue.py --large        # ResNet-18, GPT and MiniLM as well
    python benchmarks/rescue.py --quick        # a few cheap runs; touches no docs
    python benchmarks/rescue.py list           # what there is, and how long it will take
    python benchmarks/rescue.py report         # from the runs there are
    python benchmarks/rescue.py --policies cap cap:c_bs=1.5   # settings beside one another
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness.cells import Cells
from harness.grid import (
    CALIBRATION,
    EDGES,
    LONG,
    RESCUE,
    SEEDS,
    multiplied,
    noisy,
    rescue,
)
from harness.policies import BASELINES, BATCHES, TUNED
from harness.program import Options, Question, written
from harness.run import Run
from harness.store import Job, Store
from harness.story import read
from harness.tables import control

QUICK = ("mlp-digits sgd", "mlp-mnist sgd", "mlp-mnist adamw")
TUNINGS = (0.5, 1.0, 2.0, 4.0)  # multiples tried with a warm-up


class Rescue(Question):
    """What does a controller do to a run?"""

    name = "rescue"
    usage = __doc__

    def options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--large", action="store_true", help="with the large nets")

    def jobs(self, options: Options) -> list[Job]:
        if options.policies:  # on the set that settings may be chosen on
            runs = [r for r in _runs(options) if r.part == "development"]
            return [(r, p) for r in runs for p in ("none", *options.policies)]
        extras = [job for part in _extras(options).values() for job in part]
        return [*_grid(options), *_tunings(options), *extras]

    def later(self, options: Options, store: Store) -> list[Job]:
        """The best warm-up of each setting and schedule, on the seeds of the others."""
        if options.policies:
            return []
        found = Cells(read(store, _tunings(options)))
        jobs: list[Job] = []
        for setting, schedule in found.pairs():
            cells = (found.cell(TUNED, (setting, schedule), m) for m in TUNINGS)
            best = min((s for cell in cells for s in cell), key=lambda s: s.loss).run.multiple
            seeds = SEEDS[setting.part]
            jobs += [(multiplied(setting, schedule, best, seed), TUNED) for seed in seeds]
        return jobs

    def report(self, options: Options, store: Store, out: Path) -> str | None:
        from harness import plots  # matplotlib, which training does without

        if options.policies:
            return control.settings(Cells(read(store, self.jobs(options))), options.policies)
        jobs = [*_grid(options), *self.later(options, store)]
        found = read(store, jobs)
        if not found:
            return None
        by_set = {part: Cells(s for s in found if s.run.part == part) for part in reversed(SEEDS)}
        by_set = {part: cells for part, cells in by_set.items() if cells.all}
        extra_jobs = _extras(options)
        extras = {name: Cells(read(store, own)) for name, own in extra_jobs.items()}
        beside = [s for cells in extras.values() for s in cells.all]
        wanted = len(jobs) + sum(map(len, extra_jobs.values()))
        plots.what_is_left(Cells(found), out / "rescue.png")
        return page(by_set, extras, written(self.name, [*found, *beside], wanted))


def _runs(options: Options) -> list[Run]:
    if options.quick:
        runs = rescue([s for s in RESCUE if s.label in QUICK], few=True, seeds=1)
    else:
        runs = rescue([s for s in RESCUE if options.large or not s.costly])
    return [run for run in runs if options.only in run.name]


def _grid(options: Options) -> list[Job]:
    runs = _runs(options)
    jobs = [(run, policy) for run in runs for policy in ("none", "cap")]
    return jobs + [(run, policy) for run in runs if _is_compared(run) for policy in BASELINES]


def _is_compared(run: Run) -> bool:
    """Tell whether a run is done with what people use instead: of the large nets on one seed."""
    large = {s for s in RESCUE if s.costly}
    first = run.recipe.seed == SEEDS[run.part][0]
    return run.multiple > 1 and (first or run.setting not in large)


def _tunings(options: Options) -> list[Job]:
    """Warm-ups in front of each schedule, at rates to choose from, on a seed of their own."""
    if options.quick:
        return []
    pairs = dict.fromkeys((r.setting, r.recipe.schedule) for r in _runs(options))
    return [
        (multiplied(setting, schedule, multiple, CALIBRATION), TUNED)
        for setting, schedule in pairs
        for multiple in TUNINGS
    ]


def _extras(options: Options) -> dict[str, list[Job]]:
    """What is measured beside the grid: overhead of long runs, full batches, small batches."""
    if options.quick:
        return {}
    long = [s for s in LONG if options.large or not s.costly]
    edges = [multiplied(s, "constant", m, 2) for s in EDGES for m in (0.5, 1.0)]
    return {
        "long": [
            (multiplied(s, "cosine", m, 2), policy)
            for s in long
            for m in (1.0, 8.0)
            for policy in ("none", "cap", "lean")
        ],
        "edge": [(run, policy) for run in edges for policy in ("none", "cap")],
        "noisy": [(run, policy) for run in noisy() for policy in ("none", *BATCHES)]
        + [(run, "batches") for run in edges],
    }


def page(sets: dict[str, Cells], extras: dict[str, Cells], head: str) -> str:
    """Return the whole report: the bars, then every cell."""
    return f"""# Rescuing runs whose learning rate is too high

{head}

Each run starts from a multiple of the rate that trains its task best at a constant rate, found
beforehand (`benchmarks/tasks/rates.json`); schedules are multiplied as a whole. The settings of
`LearningRateCap` were chosen on one set of tasks ("development"); the other ("validation") has
other architectures and seeds. Monitor and controller run with their defaults. Loss is the mean
training loss of the last 20 steps, accuracy is on held-out data; both are means over seeds. What
people use instead was tried on one seed of the large nets, and is compared on that one.

## Bars

{control.bars(sets)}

## Rescued

Runs that end within max(3 x the tuned rate's loss, it + 2 standard deviations over seeds), and
within 1.5 points of its accuracy:

{control.shares(sets, "rescued")}

Runs that end no better than chance:

{control.shares(sets, "diverged")}

![Final loss by multiple](rescue.png)

{_beside(extras)}
## Every cell

{control.every_cell(sets)}
"""


def _beside(extras: dict[str, Cells]) -> str:
    text = ""
    if "long" in extras:
        text += f"""## What it costs

Lean: `Measurement(quantities="loss"), budget=0.05`.

{control.costs(extras["long"])}

"""
    if "edge" in extras:
        text += f"""## Full-batch gradient descent at the edge of stability, 2000 steps

{control.full_batches(extras["edge"])}

"""
    if "noisy" in extras:
        text += f"""## The batch

Batches of 16 at rates that suit 64, with `BatchSizeScaler` (defaults, up to 256 items), for as many
steps; and full batches, where it must not act. Loss and accuracy, and the multiples of the batch
that were used:

{control.batches(extras["noisy"])}

"""
    return text


if __name__ == "__main__":
    sys.exit(Rescue().main())
