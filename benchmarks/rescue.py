"""Does the learning-rate cap rescue runs whose rate is too high, and leave the others alone?

Trains real nets from multiples of their tuned rate, without control, with geomwatch's cap, and with
what people use instead. Each outcome is kept as soon as it is there, so that the whole can be
stopped and started again.

    python benchmarks/rescue.py                # what is missing of the small nets, then the report
    python benchmarks/rescue.py --large        # ResNet-18, GPT and MiniLM as well
    python benchmarks/rescue.py --quick        # a few cheap runs; touches no docs
    python benchmarks/rescue.py list           # what there is, and how long it will take
    python benchmarks/rescue.py report         # from the runs there are
    python benchmarks/rescue.py try --policies cap,cap:c_bs=1.5   # settings, on one half
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rescuing.execute import BATCHES, TUNED
from rescuing.grid import (
    CALIBRATION,
    EDGES,
    LONG,
    SEEDS,
    SETTINGS,
    Run,
    Setting,
    noisy,
    runs,
)
from rescuing.outcomes import Outcome, Outcomes
from rescuing.policies import BASELINES
from rescuing.pool import predicted_seconds, work
from rescuing.report import write
from rescuing.settings import compare
from rescuing.store import Job, Store
from side_by_side import code

ROOT = Path(__file__).parents[1]
FOLDER, DOCS = ROOT / "runs/rescue", ROOT / "docs/benchmarks"
QUICK_FOLDER = ROOT / "runs/rescue-quick"
QUICK = ("mlp-digits sgd", "mlp-mnist sgd", "mlp-mnist adamw")
TUNINGS = (0.5, 1.0, 2.0, 4.0)  # multiples tried with a warm-up


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    folder = options.folder or (QUICK_FOLDER if options.quick else FOLDER)
    store = Store(folder)
    if options.verb == "try":
        return _try(options, store)
    jobs = _jobs(options)
    if options.verb == "list":
        return _list(options, store, jobs)
    if options.verb == "run":
        failures = work(store.missing(jobs), folder, workers=options.workers)
        chosen = _chosen(store, options)
        failures += work(store.missing(chosen), folder, workers=options.workers)
        for job, trace in failures:
            print(f"{job[0].name} ({job[1]}) failed:\n{trace}", file=sys.stderr)
        if failures:
            return 1
    return _report(options, store, jobs + _chosen(store, options))


def _settings(options: argparse.Namespace) -> list[Setting]:
    own = [s for s in SETTINGS if options.large or not s.large]
    if options.quick:
        own = [s for s in SETTINGS if s.label in QUICK]
    return [s for s in own if options.only in s.label]


def _jobs(options: argparse.Namespace) -> list[Job]:
    grid = runs(_settings(options), few=options.quick, seeds=1 if options.quick else 3)
    jobs = [(run, policy) for run in grid for policy in ("none", "cap")]
    jobs += [(run, policy) for run in grid if _is_compared(run) for policy in BASELINES]
    if not options.quick:
        jobs += _tunings(options)
        jobs += [job for part in _extra_jobs(options).values() for job in part]
    return jobs


def _is_compared(run: Run) -> bool:
    """Tell whether a run is done with what people use instead: of the large nets on one seed."""
    first = run.seed == SEEDS[run.setting.half][0]
    return run.multiple > 1 and (first or not run.setting.large)


def _tunings(options: argparse.Namespace) -> list[Job]:
    """Warm-ups in front of each schedule, at rates to choose from, on a seed of their own."""
    return [
        (Run(setting, schedule, multiple, CALIBRATION), TUNED)
        for setting, schedule in _pairs(options)
        for multiple in TUNINGS
    ]


def _chosen(store: Store, options: argparse.Namespace) -> list[Job]:
    """The best of these warm-ups, on the seeds of the others."""
    if options.quick:
        return []
    found = Outcomes(_read(store, _tunings(options)))
    jobs: list[Job] = []
    for setting, schedule in found.pairs():
        tried = [o for o in found.all if (o.run.setting, o.run.schedule) == (setting, schedule)]
        best = min(tried, key=lambda o: o.loss).run.multiple
        own = [run for run in runs([setting]) if run.schedule == schedule and run.multiple == 1]
        jobs += [(Run(setting, schedule, best, run.seed), TUNED) for run in own]
    return jobs


def _extra_jobs(options: argparse.Namespace) -> dict[str, list[Job]]:
    """What is measured beside the grid: overhead over long runs, and the edge of stability."""
    long = [s for s in LONG if options.large or not s.large]
    edges = [Run(s, "constant", m, 2) for s in EDGES for m in (0.5, 1.0)]
    return {
        "long": [
            (Run(s, "cosine", m, 2), policy)
            for s in long
            for m in (1.0, 8.0)
            for policy in ("none", "cap", "lean")
        ],
        "edge": [(run, policy) for run in edges for policy in ("none", "cap")],
        "noisy": [(run, policy) for run in noisy() for policy in ("none", *BATCHES)]
        + [(run, "batches") for run in edges],
    }


def _pairs(options: argparse.Namespace) -> list[tuple[Setting, str]]:
    return list(dict.fromkeys((r.setting, r.schedule) for r in runs(_settings(options))))


def _list(options: argparse.Namespace, store: Store, jobs: Sequence[Job]) -> int:
    missing = store.missing(jobs)
    minutes = sum(map(predicted_seconds, missing)) / options.workers / 60
    by_setting = Counter(run.setting.label for run, _ in missing)
    for label, count in by_setting.items():
        print(f"{count:5d} missing of {label}")
    print(f"{len(jobs)} trainings, {len(missing)} missing: about {minutes:.0f} minutes.")
    return 0


def _report(options: argparse.Namespace, store: Store, jobs: Sequence[Job]) -> int:
    from rescuing import plots  # matplotlib, which training does without

    extras = {} if options.quick else _extra_jobs(options)
    beside = {job for part in extras.values() for job in part}
    found = _read(store, [job for job in jobs if job not in beside])
    if not found:
        print(f"no runs under {store.folder}", file=sys.stderr)
        return 1
    halves = {
        half: Outcomes(o for o in found if o.run.setting.half == half and _counts(o))
        for half in ("held", "tune")
    }
    halves = {name: half for name, half in halves.items() if half.all}
    others = {name: Outcomes(_read(store, part)) for name, part in extras.items()}
    out = store.folder if options.quick or options.folder else DOCS
    text = write(halves, others, note=_note(found, len(jobs) - len(beside)))
    (out / "rescue.md").write_text(text, encoding="utf-8")
    plots.draw(halves, out / "rescue.png")
    print(text)
    return 0


def _counts(outcome: Outcome) -> bool:
    return outcome.run.seed != CALIBRATION


def _try(options: argparse.Namespace, store: Store) -> int:
    """Compare settings of the cap on one half, by default that which they are chosen on."""
    settings = [s for s in _settings(options) if s.half == options.half]
    multiples = {float(multiple) for multiple in options.multiples.split(",")}
    grid = [r for r in runs(settings) if r.schedule in options.schedules.split(",")]
    grid = [r for r in grid if r.multiple in multiples]
    policies = ["none", *_split(options.policies)]
    jobs = [(run, policy) for run in grid for policy in policies]
    failures = work(store.missing(jobs), store.folder, workers=options.workers)
    for job, trace in failures:
        print(f"{job[0].name} ({job[1]}) failed:\n{trace}", file=sys.stderr)
    print(compare(Outcomes(_read(store, jobs)), policies[1:]))
    return int(bool(failures))


def _split(policies: str) -> list[str]:
    return [policy for policy in policies.split(";") if policy]


def _read(store: Store, jobs: Iterable[Job]) -> list[Outcome]:
    found = ((job, store.load(job)) for job in jobs)
    return [Outcome.of(*job, data) for job, data in found if data is not None]


def _note(found: Sequence[Outcome], wanted: int) -> str:
    notes = []
    if len(found) < wanted:
        notes.append(f"**Incomplete: {wanted - len(found)} runs are missing.**")
    versions = {o.data["code"] for o in found if o.policy == "cap"}
    if len(versions) > 1:
        notes.append(f"The controlled runs were done with {len(versions)} versions of geomwatch.")
    elif versions and code() not in versions:
        notes.append("geomwatch has changed since.")
    return " ".join(notes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", nargs="?", default="run", choices=("run", "list", "report", "try"))
    parser.add_argument("--quick", action="store_true", help="a few cheap runs, no docs")
    parser.add_argument("--large", action="store_true", help="with the large nets")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--only", default="", help="settings whose label contains this")
    parser.add_argument("--folder", type=Path, help="of the runs, and then of the report")
    parser.add_argument("--policies", default="cap", help="try: separated by semicolons")
    parser.add_argument("--schedules", default="constant,cosine", help="try: comma-separated")
    parser.add_argument("--multiples", default="0.25,1,8,30", help="try: comma-separated")
    parser.add_argument("--half", default="tune", choices=("tune", "held"), help="try: which")
    return parser


if __name__ == "__main__":
    sys.exit(main())
