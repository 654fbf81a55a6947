"""Is a jump of the learning rate announced before the step that applies it?

Trains nets on real data at a constant rate with the monitor's defaults, and lets a torch scheduler
multiply the rate by 4 to 30 at step 150; then trains on, which tells whether the jump was fatal.
The levels of geomwatch/rules/rate_jump.py were chosen on the first half of these runs; the second
has other seeds, and nets and batch sizes that the first has not. Results are kept run by run in
benchmarks/results/, so that it can be stopped and started again.

    python benchmarks/lr_jumps.py            # some 25 minutes on one core; writes docs/
    python benchmarks/lr_jumps.py --quick    # half a minute, writes nothing
    python benchmarks/lr_jumps.py --part 0/2 & python benchmarks/lr_jumps.py --part 1/2
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from forecasting.outcome import judge
from forecasting.stats import Share
from tasks import TASKS
from tasks.rates import rates
from tasks.training import Recipe, prepare, tail, train
from torch.optim.lr_scheduler import MultiStepLR

import geomwatch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/lr_jumps.jsonl"
OUT = ROOT / "docs/benchmarks/lr_jumps.md"
JUMP, STEPS = 150, 450
FACTORS = (4.0, 8.0, 16.0, 30.0)

CHOSEN_ON = (
    ("mlp-digits", "sgd", 64),
    ("mlp-digits", "sgd", 16),
    ("mlp-digits", "sgd", 4),
    ("mlp-digits", "sgd", None),
    ("mlp-digits", "adam", 64),
    ("mlp-digits", "adam", None),
    ("mlp-digits", "adamw", 16),
    ("mlp-mnist", "sgd", 64),
    ("mlp-mnist", "adam", 64),
    ("encoder-digits", "sgd", 64),
    ("encoder-digits", "adam", 16),
    ("encoder-digits", "adamw", 64),
    ("conv-mnist", "sgd", 64),
    ("conv-mnist", "sgd", 16),
    ("conv-mnist", "adamw", 64),
    ("lstm-kjv", "sgd", 16),
    ("lstm-kjv", "adamw", 16),
)
HELD_BACK = (
    ("mlp-mnist", "sgd", 16),
    ("mlp-mnist", "sgd", 4),
    ("mlp-mnist", "sgd", None),
    ("mlp-mnist", "adam", None),
    ("mlp-mnist", "adamw", 16),
    ("encoder-digits", "sgd", 16),
    ("resnet-mnist", "sgd", 64),
    ("resnet-mnist", "sgd", 16),
    ("resnet-mnist", "adamw", 64),
    ("gpt-kjv", "sgd", 16),
    ("gpt-kjv", "adamw", 16),
)


@dataclass(frozen=True)
class Job:
    """One run: `share` of the tuned rate, which is multiplied by `factor` at step 150."""

    task: str
    optimizer: str
    batch: int | None
    seed: int
    share: float
    factor: float
    held_back: bool


@dataclass(frozen=True)
class Run:
    """What became of a job, and the critical alerts at the very step of the jump, by rule."""

    job: Job
    label: str
    left: float | None
    alerts: tuple[str, ...]
    earlier: int  # alerts at or above warning before the jump
    overhead: float  # seconds in probes over those of training

    @property
    def announced(self) -> bool:
        """Whether anything critical was said before the step."""
        return bool(self.alerts)


def jobs(quick: bool) -> Iterator[Job]:
    if quick:
        for factor in (4.0, 30.0):
            yield Job("mlp-digits", "sgd", 64, 0, 1.0, factor, False)
        return
    for kind, factor in itertools.product(CHOSEN_ON, FACTORS):
        for seed, share in ((0, 1.0), (1, 1.0), (2, 0.3)):
            yield Job(*kind, seed, share, factor, False)
        yield Job(*kind, 3, 1.0, factor, True)
    for kind, factor in itertools.product(HELD_BACK, FACTORS):
        for seed, share in ((0, 1.0), (1, 0.3)):
            yield Job(*kind, seed, share, factor, True)


def run(job: Job) -> Run:
    """Train with the defaults a user gets."""
    task = TASKS[job.task]
    known = rates(task, job.optimizer, job.batch)
    recipe = Recipe(job.optimizer, job.share * known.tuned, job.batch, job.seed, STEPS)
    loop = prepare(task, recipe)
    loop.scheduler = MultiStepLR(loop.optimizer, [JUMP], gamma=job.factor)
    monitor = geomwatch.Monitor(loop.model, task.loss_fn, loop.optimizer)
    with monitor:
        trace = train(
            loop, recipe, lambda step, batch, loss: monitor.step(batch, loss=loss) and None
        )
    left = known.lost(tail(trace, task.items(job.batch)))
    outcome = judge(trace.losses, known, items=task.items(job.batch), left=left, from_start=False)
    loud = [a for a in monitor.alerts if a.severity != "info"]
    return Run(
        job,
        outcome.label,
        left if math.isfinite(left) else None,
        tuple(a.rule for a in loud if a.step == JUMP and a.severity == "critical"),
        sum(a.step < JUMP for a in loud),
        monitor.probe_seconds / trace.seconds,
    )


def stored() -> dict[Job, Run]:
    """Return the runs there are."""
    done: dict[Job, Run] = {}
    for line in RESULTS.read_text().splitlines() if RESULTS.exists() else ():
        found = json.loads(line)
        job = Job(**found.pop("job"))
        done[job] = Run(job, **{**found, "alerts": tuple(found["alerts"])})
    return done


def results(quick: bool, part: tuple[int, int]) -> list[Run]:
    """Run what is missing; with a part of (i, n) only each n-th job, from i."""
    done = {} if quick else stored()
    first, each = part
    wanted = list(jobs(quick))[first::each]
    for number, job in enumerate(wanted, 1):
        if job not in done:
            done[job] = run(job)
            if not quick:
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(asdict(done[job])) + "\n")
        print(f"\r{number}/{len(wanted)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [done[job] for job in wanted]


def report(runs: Sequence[Run]) -> str:
    chosen = [r for r in runs if not r.job.held_back]
    held = [r for r in runs if r.job.held_back]
    wanted = sum(1 for _ in jobs(quick=False))
    excluded = sum(r.label == "excluded" for r in runs)
    early = sum(r.earlier > 0 for r in runs)
    cost = sorted(r.overhead for r in runs)[len(runs) // 2]
    return f"""# Jumps of the learning rate

Written by `benchmarks/lr_jumps.py`: {len(runs)} of {wanted} runs, with the monitor's
defaults, in which a torch scheduler multiplies the rate by 4, 8, 16 or 30 at step {JUMP}, from the
tuned rate or 0.3 x that.
Announced means: a critical alert at that step, before it is taken. Whether a jump is fatal is told
by training on for {STEPS - JUMP} steps (`benchmarks/forecasting/outcome.py`): fatal if the loss
blows up and more than a third of what can be learnt is left at the end; harmless if it does not
blow up and less than a fifth is left. {excluded} runs in between are left out, spikes that heal
mostly. Shares have 95 % intervals. {early} of the {len(runs)} runs had an alert at or above warning
before the jump; probes took {cost:.0%} of the time of training in the median run, in which one
third of the steps belongs to a start that is watched densely.

The levels were chosen on the first half. The second has another seed of the same nets, and nets,
batch sizes and optimizers that the first has not. Two of the levels (where noise is said to
dominate, and what methods that adapt survive where it does not) were moved once after the second
half had been seen, for the sake of false alarms in the first.

{_table(chosen, held, _HALVES)}

The held-back half by kind:

{_table(chosen, held, _KINDS)}

By rule, over both halves:

| rule | fatal jumps announced | harmless jumps announced |
|---|---|---|
{_by_rule(runs)}
"""


Choice = Callable[[Run], bool]
_HALVES: dict[str, tuple[bool, Choice]] = {
    "chosen on": (False, lambda r: True),
    "held back": (True, lambda r: True),
}
_KINDS: dict[str, tuple[bool, Choice]] = {
    "another seed": (True, lambda r: (r.job.task, r.job.optimizer, r.job.batch) in CHOSEN_ON),
    "other nets and batches": (
        True,
        lambda r: (r.job.task, r.job.optimizer, r.job.batch) in HELD_BACK,
    ),
    "SGD with momentum": (True, lambda r: r.job.optimizer == "sgd" and r.job.batch is not None),
    "Adam, AdamW": (True, lambda r: r.job.optimizer != "sgd" and r.job.batch is not None),
    "full batch": (True, lambda r: r.job.batch is None),
}


def _table(
    chosen: Sequence[Run], held: Sequence[Run], kinds: dict[str, tuple[bool, Choice]]
) -> str:
    rows = ["| runs | fatal jumps announced | harmless jumps announced |", "|---|---|---|"]
    for name, (is_held, choice) in kinds.items():
        some = [r for r in (held if is_held else chosen) if choice(r)]
        fatal, harmless = _shares(some, lambda r: r.announced)
        rows.append(f"| {name} | {fatal} | {harmless} |")
    return "\n".join(rows)


def _by_rule(runs: Sequence[Run]) -> str:
    rows = []
    for rule in ("rate_jump", "stability_margin"):
        fatal, harmless = _shares(runs, lambda r, rule=rule: rule in r.alerts)
        rows.append(f"| {rule} | {fatal} | {harmless} |")
    return "\n".join(rows)


def _shares(runs: Sequence[Run], announced: Choice) -> tuple[Share, Share]:
    ill = [r for r in runs if r.label == "failed"]
    well = [r for r in runs if r.label == "healthy"]
    return (
        Share(sum(map(announced, ill)), len(ill)),
        Share(sum(map(announced, well)), len(well)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="from the runs there are")
    parser.add_argument("--part", default="0/1", help="i/n: each n-th run, from i; no report")
    options = parser.parse_args()
    quick, part = options.quick, tuple(map(int, options.part.split("/")))
    logging.getLogger("geomwatch").setLevel(logging.CRITICAL + 1)
    torch.set_num_threads(1)
    if options.report:
        done = stored()
        runs = [done[job] for job in jobs(quick=False) if job in done]
    else:
        runs = results(quick, part)
    text = report(runs)
    print(text)
    if not quick and part == (0, 1):
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
