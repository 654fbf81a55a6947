"""Finds the learning rates of each task, optimizer and batch size; writes rates.json.

Constant rates a factor of two apart, up from a guess until two in a row fail, down from it until
two in a row train worse than the best; two seeds each that no benchmark uses. About 35 minutes on
one core in all; what is known already is skipped.

    python benchmarks/tasks/calibrate.py [--only TASK]
    python benchmarks/tasks/calibrate.py --time    # only measure again how long runs take
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from tasks import TASKS
from tasks.rates import PATH, derive, fails, key
from tasks.task import Task
from tasks.training import Recipe, prepare, tail, train

SEEDS = (1000, 1001)
GUESS = {"gd": 0.1, "sgd": 0.1, "adam": 4e-3, "adamw": 4e-3}
RUNGS = 8  # at most, up and down from the guess

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

    def _run(self, rate: float, seed: int) -> float:
        recipe = Recipe(self.optimizer, rate, self.batch, seed, self.task.steps)
        trace = train(prepare(self.task, recipe))
        return tail(trace, self.task.items(self.batch))


def climb(task: Task, optimizer: str, batch: int | None) -> Ladder:
    """Try rates down from a guess until two in a row are worse, up until two in a row fail."""
    ladder = Ladder(task, optimizer, batch)
    guess = 1e-4 if task.name.startswith("minilm") else GUESS[optimizer]
    ladder.mean(guess)
    for worse in (
        lambda rung: ladder.mean(guess / 2**rung) > ladder.floor,
        lambda rung: ladder.fails(guess * 2**rung),
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
    parser.add_argument("--time", action="store_true", help="only measure durations again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for combination in COMBINATIONS:
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
