"""Are failing runs announced before they fail, and healthy ones left in peace?

Trains real nets, healthy and failing, with a monitor beside each, and compares what geomwatch says
with detectors that use the loss and the gradient alone. Thresholds are frozen on one set of tasks
and reported on another. Each run is kept as soon as it is done, so that the whole can be stopped
and started again; `report` and `replay` train nothing. Writes docs/benchmarks/forecast.md.

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
from collections.abc import Sequence
from pathlib import Path

from harness import grid
from harness.outcome import HEALTHY
from harness.policies import ADVICE, BUDGETS, DEFAULT
from harness.program import Options, Question, Verb, written
from harness.replay import differences, read_replayed
from harness.run import Run
from harness.scoring import MOST_FALSE, failed
from harness.store import Job, Store
from harness.story import Story, read
from harness.tables.noise import batch_noise
from harness.tables.ramps import equal_false_alarms, ramps
from harness.tables.scenarios import advice, edges, jumps, starts
from harness.tables.summary import budgets, by_task, census, false_alarms
from harness.tables.writing import Sets


class Forecast(Question):
    """Which failures are announced?"""

    name = "forecast"
    usage = __doc__

    def options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--replay", action="store_true", help="report: by today's rules")

    @property
    def verbs(self) -> dict[str, Verb]:
        return {**super().verbs, "replay": self._replay}

    def jobs(self, options: Options) -> list[Job]:
        wanted = [p for p in self._policies(options) if p != ADVICE]
        return [(r, p) for p in wanted for r in self._runs(options) if concerns(r, p)]

    def later(self, options: Options, store: Store) -> list[Job]:
        """The failing runs once more, with somebody who follows advice."""
        if ADVICE not in self._policies(options):
            return []
        stories = read(store, [(run, DEFAULT) for run in self._runs(options)])
        return [(s.run, ADVICE) for s in failed(stories)]

    def report(self, options: Options, store: Store, out: Path) -> str | None:
        from harness import plots  # matplotlib, which training does without

        runs = self._runs(options)
        found = {p: self._read(options, store, runs, p) for p in self._policies(options)}
        if not found.get(DEFAULT):
            return None
        sets = {policy: Sets.of(stories) for policy, stories in found.items() if stories}
        plots.roc(sets[DEFAULT], out / "forecast_roc.png")
        plots.leads(sets[DEFAULT], out / "forecast_lead.png")
        head = written(self.name, found[DEFAULT], len(runs))
        replayed = " Alerts: today's rules on stored observations." if options.replay else ""
        return page(sets, head + replayed)

    def _replay(self, options: Options, store: Store) -> int:
        for policy in self._policies(options):
            stories = read(store, [(run, policy) for run in self._runs(options)])
            changed = differences(stories)
            for d in changed:
                event = d.story.outcome.event
                print(
                    f"{policy:7s} {d.story.run.name:45s} {d.story.outcome.label:8s} "
                    f"event {event}: first alert {d.before} -> {d.after}"
                )
            print(f"{policy}: {len(changed)} of {len(stories)} runs would be judged otherwise.")
        return 0

    def _runs(self, options: Options) -> list[Run]:
        runs = grid.forecast_quick() if options.quick else grid.forecast()
        return [run for run in runs if options.only in run.name]

    def _policies(self, options: Options) -> Sequence[str]:
        usual = (DEFAULT, "10%", ADVICE) if options.quick else (*BUDGETS, ADVICE)
        return options.policies or usual

    def _read(
        self, options: Options, store: Store, runs: Sequence[Run], policy: str
    ) -> list[Story]:
        if options.replay:
            return read_replayed(store, runs, policy, workers=options.workers)
        return read(store, [(run, policy) for run in runs])


def concerns(run: Run, policy: str) -> bool:
    """Tell whether a run is done under a policy.

    Budgets are tried on the set that is reported, without jumps, full-batch descent and MiniLM:
    25 s a run.
    """
    return policy not in BUDGETS[1:] or (
        run.part == "validation"
        and run.scenario in ("steady", "start", "ramp")
        and not run.task_name.startswith("minilm")
    )


def page(by_policy: dict[str, Sets], head: str) -> str:
    """Return the whole report: each figure with its interval and what its probes cost."""
    main = by_policy[DEFAULT]
    return f"""# Forecasting failed runs

{head}

The runs come in two sets that differ in architecture *and* seed. Thresholds of the baselines were
chosen on one ("chosen on"), as low as at most {MOST_FALSE:.0%} of its healthy runs allow, and
frozen; all figures with an interval are of the other ("held back"). geomwatch runs with its
defaults, one set of levels for all. Intervals are 95 %: Clopper-Pearson for shares, bootstrap for
medians. What counts as failed and healthy was fixed beforehand, by losses alone:
`benchmarks/harness/outcome.py`. Announced means: before the step at which the loss blows up.
Lead is counted in optimizer steps, over the runs announced. Overhead is the median wall time of the
monitor over that of forward, backward and optimizer; in brackets that of the probes after the first
10 % of the steps, to which a longer run converges.

{census(main)}

## Rates too large from the start

{starts(main)}

## Batch noise before the first step

What batches that differ in curvature add to the stability margin, N = M_ms - M, by the first probe
and at the largest rate of the schedule. Nets with BatchNorm have no micro-batches and are left out.

{batch_noise(main)}

## Ramps, SGD with momentum

A ramp is a LinearLR of torch, which leaves the rate that it is headed for in the optimizer. What is
announced of one that leaves nothing there is in the row "of an unknown schedule".

{ramps(main, adaptive=False)}

The same detectors with thresholds chosen in hindsight, on the held-back runs themselves:

{equal_false_alarms(main, adaptive=False)}

![ROC curves](forecast_roc.png)

![Lead](forecast_lead.png)

## Ramps, Adam and AdamW

{ramps(main, adaptive=True)}

{equal_false_alarms(main, adaptive=True)}

## Jumps of the rate by a scheduler

A critical alert before the step that is taken at the new rate.

{jumps(main)}

## Full-batch gradient descent at the edge of stability

{edges(main)}

## False alarms

Healthy is a run that ends well, also one at many times the tuned rate that ends less well than it
might. By its largest rate:

{false_alarms(main)}

## By task

{by_task(main)}

## Advice followed

From the alert on, the learning rate is held at or below what its message says. Where the message
says to start again (in the first 20 steps, or when all that was learnt is lost), the run does, at
the advised rate at most and with all of its steps; three times at most. A run trains when less than
{HEALTHY:.0%} of what can be learnt is left at its end.

{advice(main, by_policy[ADVICE]) if ADVICE in by_policy else "Not run."}

## Budgets

Runs of the held-back set that were done with each of these budgets.

{budgets({name: by_policy[name] for name in BUDGETS if name in by_policy})}
"""


if __name__ == "__main__":
    sys.exit(Forecast().main())
