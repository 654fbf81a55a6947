"""Are failing runs announced before they fail, and healthy ones left in peace?

Trains real nets, healthy and failing, with a monitor beside each, and compares what geomwatch says
with detectors that use the loss and the gradient alone. Thresholds are frozen on one half of the
runs and reported on the other. Each run is kept as soon as it is done, so that the whole can be
stopped and started again; `report` and `replay` train nothing.

    python benchmarks/forecast.py                     # what is missing, then the report in docs/
    python benchmarks/forecast.py --policies default  # only with the monitor's defaults
    python benchmarks/forecast.py --quick             # a few cheap runs; touches no docs
    python benchmarks/forecast.py list                # what there is, and how long it will take
    python benchmarks/forecast.py report [--replay]   # from the runs there are
    python benchmarks/forecast.py replay              # which verdicts today's rules would change
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from forecasting.grid import Run, grid, quick
from forecasting.halves import Halves
from forecasting.policies import ADVICE, DEFAULT, POLICIES, QUICK
from forecasting.pool import predicted_seconds, work
from forecasting.replay import differences, read_replayed
from forecasting.report import write
from forecasting.scoring import failed
from forecasting.store import Store
from forecasting.story import Story, read
from side_by_side import code

ROOT = Path(__file__).parents[1]
RUNS, DOCS = ROOT / "runs/forecast", ROOT / "docs/benchmarks"
QUICK_RUNS = ROOT / "runs/forecast-quick"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    usual = QUICK if options.quick else tuple(POLICIES)
    policies = options.policies.split(",") if options.policies else usual
    if unknown := sorted(set(policies) - set(POLICIES)):
        _parser().error(f"--policies must be among {', '.join(POLICIES)}, got {unknown}")
    runs = [r for r in (quick() if options.quick else grid()) if options.only in r.name]
    store = Store(options.folder or (QUICK_RUNS if options.quick else RUNS))
    verbs = {"run": _run, "list": _list, "report": _report, "replay": _replay}
    return verbs[options.verb](options, store, runs, policies)


def _run(
    options: argparse.Namespace, store: Store, runs: Sequence[Run], policies: Sequence[str]
) -> int:
    jobs = store.missing(runs, [policy for policy in policies if policy != ADVICE])
    failures = work(jobs, store.folder, workers=options.workers)
    if ADVICE in policies:
        failing = [s.run for s in failed(read(store, runs, DEFAULT))]
        failures += work(store.missing(failing, [ADVICE]), store.folder, workers=options.workers)
    for (run, policy), trace in failures:
        print(f"{run.name} ({policy}) failed:\n{trace}", file=sys.stderr)
    if options.only:
        return int(bool(failures))
    return _report(options, store, runs, policies) or int(bool(failures))


def _list(
    options: argparse.Namespace, store: Store, runs: Sequence[Run], policies: Sequence[str]
) -> int:
    jobs = store.missing(runs, [policy for policy in policies if policy != ADVICE])
    seconds = sum(map(predicted_seconds, jobs))
    if ADVICE in policies:  # about half of the runs fail, and have advice to follow
        seconds += 0.5 * sum(predicted_seconds((run, ADVICE)) for run in runs)
    for run in runs:
        there = [policy for policy in policies if store.has(run, policy)]
        print(f"{run.half}  {run.scenario:7s} {run.name:45s} {' '.join(there) or 'missing'}")
    print(
        f"{len(runs)} runs under {len(policies)} policies, {len(jobs)} missing: about "
        f"{seconds / options.workers / 60:.0f} minutes with {options.workers} workers."
    )
    return 0


def _report(
    options: argparse.Namespace, store: Store, runs: Sequence[Run], policies: Sequence[str]
) -> int:
    from forecasting import plots  # matplotlib, which training does without

    again = partial(read_replayed, workers=options.workers)
    found = {p: (again if options.replay else read)(store, runs, p) for p in policies}
    if not found.get(DEFAULT):
        print(f"no runs with the policy {DEFAULT!r} under {store.folder}", file=sys.stderr)
        return 1
    halves = {policy: Halves.of(stories) for policy, stories in found.items() if stories}
    out = store.folder if options.quick or options.folder else DOCS
    text = write(halves, note=_note(found[DEFAULT], len(runs), options))
    (out / "forecast.md").write_text(text, encoding="utf-8")
    plots.roc(halves[DEFAULT], out / "forecast_roc.png")
    plots.leads(halves[DEFAULT], out / "forecast_lead.png")
    print(text)
    return 0


def _note(stories: Sequence[Story], wanted: int, options: argparse.Namespace) -> str:
    notes = []
    if len(stories) < wanted:
        notes.append(f"**Incomplete: {wanted - len(stories)} runs are missing.**")
    versions = Counter(s.data["code"] for s in stories)
    if options.replay:
        notes.append("Alerts: today's rules on stored observations.")
    if len(versions) > 1:
        notes.append(f"**The runs were done with {len(versions)} versions of geomwatch.**")
    elif versions and code() not in versions:
        notes.append("**geomwatch has changed since.**")
    return " ".join(notes)


def _replay(
    options: argparse.Namespace, store: Store, runs: Sequence[Run], policies: Sequence[str]
) -> int:
    for policy in policies:
        stories = read(store, runs, policy)
        changed = differences(stories)
        for d in changed:
            event = d.story.outcome.event
            print(
                f"{policy:7s} {d.story.run.name:45s} {d.story.outcome.label:8s} "
                f"event {event}: first alert {d.before} -> {d.after}"
            )
        print(f"{policy}: {len(changed)} of {len(stories)} runs would be judged otherwise.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "verb", nargs="?", default="run", choices=("run", "list", "report", "replay")
    )
    parser.add_argument("--quick", action="store_true", help="a few cheap runs, no docs")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one core each")
    parser.add_argument("--policies", help="comma-separated; all by default")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--folder", type=Path, help="of the runs, and then of the report")
    parser.add_argument("--replay", action="store_true", help="report: judge by today's rules")
    return parser


if __name__ == "__main__":
    sys.exit(main())
