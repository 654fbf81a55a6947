"""Finds the learning rates of each task, optimizer and batch size; writes rates.json.

Constant rates a factor of two apart (three for the tasks of kinds/), up from a guess until two in
a row fail, down from it until two in a row train worse than the best; two seeds each that no
benchmark uses. About an hour on one core in all; what is known already is skipped, so that it can
be stopped and started again.

    python benchmarks/tasks/calibrate.py [--only TASK]
    python benchmarks/tasks/calibrate.py --optimizers lion muon   # of the tasks of kinds/
    python benchmarks/tasks/calibrate.py --time    # only measure again how long runs take
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tasks import TASKS, classifiers
from tasks.rates import PATH, derive, fails, key
from tasks.task import Task
from tasks.training import Recipe, prepare, tail, train

SEEDS = (1000, 1001)
# Those of SGD differ by 1 - momentum, so that a step goes equally far in the end.
GUESS = {
    "gd": 0.1,
    "sgd0": 1.0,
    "sgd50": 0.5,
    "sgd": 0.1,
    "sgd95": 0.05,
    "nesterov": 0.1,
    "adam": 4e-3,
    "adamw": 4e-3,
    "nadam": 4e-3,
    "rmsprop": 1e-3,
    "adagrad": 0.02,
    "lion": 4e-4,
    "muon": 4e-3,
}
RUNGS = 14  # at most, up and down from the guess: what is normalised survives a lot

Combination = tuple[str, str, int | None]  # task, optimizer, batch size
COMBINATIONS: list[Combination] = [
    *(
        (task, optimizer, batch)
        for task in ("mlp-digits", "mlp-mnist")
        for optimizer, batch in (
            ("sgd", 64),
            ("sgd", 16),
            ("sgd", 4),
            ("sgd", None),
            ("adam", 64),
            ("adam", None),
            ("adamw", 16),
        )
    ),
    ("encoder-digits", "sgd", 64),
    ("encoder-digits", "sgd", 16),
    ("encoder-digits", "adam", 16),
    ("encoder-digits", "adamw", 64),
    ("conv-mnist", "sgd", 64),
    ("conv-mnist", "sgd", 16),
    ("conv-mnist", "adamw", 64),
    ("resnet-mnist", "sgd", 64),
    ("resnet-mnist", "sgd", 16),
    ("resnet-mnist", "adamw", 64),
    ("gpt-kjv", "sgd", 16),
    ("gpt-kjv", "adamw", 16),
    ("gpt-kjv", "adam", 4),
    ("lstm-kjv", "sgd", 16),
    ("lstm-kjv", "adamw", 16),
    ("minilm-verses", "adamw", 16),
    ("gd-digits", "gd", None),
    ("gd-mnist", "gd", None),
]
KINDS = [task for task in TASKS.values() if task not in classifiers.TASKS]


class Ladder:
    """The final losses of one combination by rate, tried as they are asked for."""

    def __init__(self, task: Task, optimizer: str, batch: int | None) -> None:
        self.task, self.optimizer, self.batch = task, optimizer, batch
        self.tried: dict[float, list[float]] = {}

    def mean(self, rate: float) -> float:
        if rate not in self.tried:
            self.tried[rate] = [self._run(rate, seed) for seed in SEEDS]
            print(f"    {rate:<10.4g}", *(f"{x:.4f}" for x in self.tried[rate]), flush=True)
        return statistics.fmean(self.tried[rate])

    def fails(self, rate: float) -> bool:
        self.mean(rate)
        return fails(self.tried[rate], self.floor, self.task.chance())

    @property
    def floor(self) -> float:
        return min(statistics.fmean(losses) for losses in self.tried.values())

    @functools.cached_property
    def useful(self) -> float:
        """What something has been learnt below: above, one rate is as bad as another."""
        return 0.9 * self.task.chance()

    def _run(self, rate: float, seed: int) -> float:
        recipe = Recipe(self.optimizer, rate, self.batch, seed, self.task.steps)
        trace = train(prepare(self.task, recipe))
        return tail(trace, self.task.items(self.batch))


def climb(task: Task, optimizer: str, batch: int | None) -> Ladder:
    """Try rates down from a guess until two in a row are worse, up until two in a row fail."""
    ladder, apart = Ladder(task, optimizer, batch), 3 if task in KINDS else 2
    guess = 1e-4 if task.name.startswith("minilm") else GUESS[optimizer]
    ladder.mean(guess)
    for worse in (
        lambda rung: ladder.mean(guess / apart**rung) > ladder.floor < ladder.useful,
        lambda rung: ladder.fails(guess * apart**rung),
    ):
        in_a_row = 0
        for rung in range(1, RUNGS + 1):
            in_a_row = in_a_row + 1 if worse(rung) else 0
            if in_a_row == 2:
                break
    return ladder


def entry(ladder: Ladder) -> dict[str, object]:
    tried = {
        f"{rate:.4g}": [round(x, 6) if math.isfinite(x) else None for x in ladder.tried[rate]]
        for rate in sorted(ladder.tried)
    }
    return {"seconds": seconds(ladder.task, ladder.optimizer, ladder.batch), "tried": tried}


def seconds(task: Task, optimizer: str, batch: int | None) -> float:
    """Measure what a run takes: its steps x the fastest of five trials of 12, the first 2 apart.

    The fastest, because other programs on the machine only ever add time.
    """
    recipe = Recipe(optimizer, 1e-6, batch, SEEDS[0], 12)
    best = math.inf
    for _ in range(5):
        marks: list[float] = []
        train(prepare(task, recipe), lambda *_, m=marks: m.append(time.perf_counter()))
        best = min(best, (marks[-1] - marks[1]) / (len(marks) - 2))
    return round(best * task.steps, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="combinations whose name contains this")
    parser.add_argument("--optimizers", nargs="+", choices=GUESS, default=["sgd", "adam"])
    parser.add_argument("--time", action="store_true", help="only measure durations again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = [(task.name, name, task.batch) for task in KINDS for name in options.optimizers]
    for combination in (*COMBINATIONS, *kinds):
        label = key(*combination)
        if options.only not in label or (label in _known()) != options.time:
            continue
        if options.time:
            _keep(label, {**_known()[label], "seconds": seconds(*_resolved(combination))})
            print(label, _known()[label]["seconds"], flush=True)
            continue
        print(label, flush=True)
        ladder = climb(*_resolved(combination))
        found = derive(ladder.tried, ladder.task.chance())
        print(f"    tuned {found.tuned:.4g}, breaks {found.breaks:.4g}", flush=True)
        _keep(label, entry(ladder))


def _resolved(combination: Combination) -> tuple[Task, str, int | None]:
    name, optimizer, batch = combination
    return TASKS[name], optimizer, batch


def _known() -> dict[str, dict[str, object]]:
    return json.loads(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}


def _keep(label: str, found: dict[str, object]) -> None:
    text = json.dumps(_known() | {label: found}, indent=1)
    PATH.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
