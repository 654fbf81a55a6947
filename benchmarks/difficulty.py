"""Does early curvature predict how difficult a run will be? The paper's hypothesis H5.

The paper takes O(w0), the sum of lr |g|^2 lambda_max over a run, for the difficulty of optimizing
from w0, and expects curvature early on to predict it. Targets are fixed beforehand: the loss left
at the end, as a share of what can be learnt; the steps until half of it is learnt; and the
difficulty of the *rest* of the run (that of the whole would contain the predictor). All is measured
in the first tenth of each run. Predictions are ridge regressions on ranks, fitted on all
architectures but one and judged there by Spearman's correlation:

    B0   the learning rate
    B1   B0, and loss and gradient norm at 10 %
    geo  B1, and margin, trace per parameter, roughness residual, effective rank, difficulty so far

The hypothesis holds if geo beats B1 by 0.05 or more with a 95 % bootstrap interval above 0. Writes
docs/benchmarks/difficulty.md.

    python benchmarks/difficulty.py            # what is missing, then the page
    python benchmarks/difficulty.py --quick    # a few short runs, writes nothing
    python benchmarks/difficulty.py --report   # from the runs there are
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.version import written_by
from scipy.stats import rankdata, spearmanr
from tasks import TASKS
from tasks.rates import rates
from tasks.training import Recipe, prepare, tail, train
from torch import Tensor, nn
from tqdm import tqdm

import geomwatch

ROOT = Path(__file__).parents[1]
OUT, RUNS = ROOT / "docs/benchmarks/difficulty.md", ROOT / "runs/difficulty"
ARCHITECTURES = ("mlp-digits", "mlp-mnist", "conv-mnist", "encoder-digits", "lstm-kjv")
MULTIPLES, SCALES, SEEDS = (0.25, 1.0, 3.0, 8.0), (0.5, 1.0, 2.0), (0,)
STEPS, EARLY = 300, 30
QUANTITIES = (
    "lambda_max",
    "stability_margin",
    "trace_per_param",
    "effective_rank",
    "roughness_residual",
)
B0 = ("log_rate", "log_rate_squared")
B1 = (*B0, "loss", "grad_norm")
GEO = (*B1, "stability_margin", "trace_per_param", "roughness_residual", "effective_rank", "early")
SETS = {"B0": B0, "B1": B1, "geo": GEO}
TARGETS = {
    "left": "loss left at the end",
    "steps": "steps until half is learnt",
    "remaining": "difficulty of the rest",
}
CLAIM = 0.05
_RIDGE, _RESAMPLES = 1.0, 2000


@dataclass(frozen=True)
class Run:
    """One training: an architecture, a multiple of its tuned rate, a scale of its first weights."""

    task: str
    multiple: float
    scale: float
    seed: int
    steps: int = STEPS

    @property
    def name(self) -> str:
        return f"{self.task}-x{self.multiple:g}-init{self.scale:g}-s{self.seed}-{self.steps}"


def grid(quick: bool) -> list[Run]:
    if quick:
        return [
            Run(t, m, s, 0, 60)
            for t, m, s in product(("mlp-digits", "mlp-mnist"), (0.25, 1.0, 8.0), (0.5, 2.0))
        ]
    return [Run(*c) for c in product(ARCHITECTURES, MULTIPLES, SCALES, SEEDS)]


def execute(run: Run) -> dict[str, Any]:
    """Train once; return what is known after a tenth, and what came of it."""
    task = TASKS[run.task]
    known = rates(task, "sgd", task.batch)
    recipe = Recipe("sgd", run.multiple * known.tuned, task.batch, run.seed, run.steps)
    loop = prepare(task, recipe)
    _scale(loop.model, run.scale)
    tenth = max(run.steps // 10, 3)
    options: dict[str, Any] = {"rules": []}
    first = geomwatch.Monitor(
        loop.model,
        task.loss_fn,
        loop.optimizer,
        how=geomwatch.Measurement(quantities=QUANTITIES),
        every=tenth // 3,
        **options,
    )
    whole = geomwatch.Monitor(
        loop.model,
        task.loss_fn,
        loop.optimizer,
        how=geomwatch.Measurement(quantities=("lambda_max", "difficulty")),
        every=tenth,
        **options,
    )
    early: dict[str, Any] = {}

    def watch(step: int, batch: Any, loss: Tensor) -> None:
        if step <= tenth:
            first.step(batch, loss=loss)
        whole.step(batch, loss=loss)
        if step == tenth:
            early.update(_early(first.history), loss=float(loss))
            early["early"] = whole.history[-1]["difficulty"].value

    trace = train(loop, watch)
    first.close()
    whole.close()
    losses = [known.lost(x) if math.isfinite(x) else math.inf for x in trace.losses]
    smooth = np.convolve(losses, np.ones(10) / 10, mode="valid")
    below = np.flatnonzero(smooth < 0.5)
    total = whole.history[-1]["difficulty"].value or 0.0
    return {
        **early,
        "log_rate": math.log(run.multiple),
        "log_rate_squared": math.log(run.multiple) ** 2,
        "grad_norm": trace.grad_norms[min(tenth, len(trace.grad_norms) - 1)],
        "left": known.lost(tail(trace, task.items(task.batch))),
        "steps": int(below[0]) if len(below) else run.steps,
        "remaining": max(total - (early.get("early") or 0.0), 0.0),
        "diverged": not all(map(math.isfinite, losses)),
    }


def _scale(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(factor)


def _early(history: Sequence[geomwatch.Record]) -> dict[str, float | None]:
    """Median over the probes of the first tenth."""
    found: dict[str, float | None] = {}
    for name in QUANTITIES:
        values = [r[name].value for r in history if name in r and r[name].value is not None]
        found[name] = float(np.median(values)) if values else None
    return found


def ranks(runs: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Ranks in [-1, 1]; what is missing or infinite counts as the median, or as the largest."""
    values = np.array([math.nan if r.get(name) is None else float(r[name]) for r in runs])
    finite = values[np.isfinite(values)]
    middle, top = (np.median(finite), finite.max() + 1) if len(finite) else (0.0, 1.0)
    filled = np.where(np.isnan(values), middle, np.where(np.isinf(values), top, values))
    place = rankdata(filled)
    return 2 * (place - 0.5) / len(place) - 1


def predictions(runs: Sequence[dict[str, Any]], features: Sequence[str], target: str) -> np.ndarray:
    """Leave-one-architecture-out predictions of the target's rank within its architecture."""
    names = np.array([r["task"] for r in runs])
    # ranks within an architecture: units differ between them by orders of magnitude
    columns = {n: np.zeros(len(runs)) for n in (*features, target)}
    for task in set(names):
        index = np.flatnonzero(names == task)
        for n in columns:
            columns[n][index] = ranks([runs[i] for i in index], n)
    x, y = np.stack([columns[n] for n in features], axis=1), columns[target]
    found = np.zeros(len(runs))
    for task in set(names):
        fit, judge = names != task, names == task
        gram = x[fit].T @ x[fit] + _RIDGE * np.eye(x.shape[1])
        found[judge] = x[judge] @ np.linalg.solve(gram, x[fit].T @ y[fit])
    return found


def score(runs: Sequence[dict[str, Any]], found: np.ndarray, target: str, pick: Any) -> float:
    """Mean over architectures of Spearman's correlation, among the picked runs."""
    names = np.array([r["task"] for r in runs])
    truth = np.array([np.inf if r[target] is None else r[target] for r in runs], dtype=float)
    found_at = []
    for task in sorted(set(names)):
        index = pick[names[pick] == task]
        if len(set(found[index])) > 2 and len(set(truth[index])) > 2:
            found_at.append(spearmanr(found[index], truth[index]).statistic)
    return float(np.mean(found_at)) if found_at else math.nan


def table(
    runs: Sequence[dict[str, Any]], resamples: int = _RESAMPLES
) -> tuple[list[str], dict[str, tuple[float, float, float]]]:
    """One row a target: the score of each set of features, and by how much geo beats B1."""
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(runs), len(runs)) for _ in range(resamples)]
    everything = np.arange(len(runs))
    rows, gains = [], {}
    for target, words in TARGETS.items():
        found = {n: predictions(runs, features, target) for n, features in SETS.items()}
        plain = {n: score(runs, p, target, everything) for n, p in found.items()}
        draws = [
            score(runs, found["geo"], target, i) - score(runs, found["B1"], target, i)
            for i in picks
        ]
        low, high = np.nanquantile(draws, [0.025, 0.975])
        gains[target] = (plain["geo"] - plain["B1"], float(low), float(high))
        scores = " | ".join(f"{plain[n]:.2f}" for n in SETS)
        rows.append(f"| {words} | {scores} | {gains[target][0]:+.2f} [{low:+.2f}, {high:+.2f}] |")
    return rows, gains


def verdict(gain: tuple[float, float, float]) -> str:
    value, low, high = gain
    if value >= CLAIM and low > 0:
        return "early curvature adds to what rate, loss and gradient norm tell"
    if high < CLAIM:
        return "early curvature adds nothing of note"
    return "undecided"


def report(runs: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    rows, gains = table(runs)
    failed = sum(r["left"] > 1 / 3 for r in runs)
    rates_, scales = (", ".join(f"{x:g}" for x in xs) for xs in (MULTIPLES, SCALES))
    tasks = len({r["task"] for r in runs})
    lines = [
        "# Does early curvature predict difficulty?",
        "",
        f"{written_by('difficulty.py')} The paper's hypothesis H5, with targets "
        f"fixed beforehand: {len(runs)} runs ({tasks} architectures, rates x {rates_} of the tuned "
        f"one, first weights x {scales}, SGD with momentum, {STEPS} steps), of which {failed} "
        "leave more than a third unlearnt. Everything is measured in the first tenth of a run.",
        "",
        "Spearman's correlation of prediction and target within an architecture that the "
        "prediction was not fitted on, mean over architectures. B0: the learning rate. B1: B0, "
        "loss and gradient norm at 10 %. geo: B1, margin, trace per parameter, roughness residual, "
        "effective rank and difficulty so far.",
        "",
        "| target | B0 | B1 | geo | geo - B1, 95 % interval |",
        "|---|---|---|---|---|",
        *rows,
        "",
        *(f"- {TARGETS[t]}: {verdict(g)}." for t, g in gains.items()),
        "",
        "## Each by itself",
        "",
        "A dash: withheld in every run, as the effective rank is of an indefinite spectrum.",
        "",
        "| measured early | " + " | ".join(TARGETS.values()) + " |",
        "|---|---|---|---|",
        *_alone(sorted(runs, key=lambda r: str(r["task"]))),
        "",
    ]
    return "\n".join(lines)


def _alone(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One row a quantity: its own correlation with each target, mean over architectures."""
    everything, rows = np.arange(len(runs)), []
    for name in ("log_rate", "loss", "grad_norm", *GEO[len(B1) :]):
        parts = [
            ranks([r for r in runs if r["task"] == task], name)
            for task in sorted({r["task"] for r in runs})
        ]
        column = np.concatenate(parts)
        known = any(r.get(name) is not None for r in runs)
        cells = [f"{score(runs, column, t, everything):+.2f}" if known else "-" for t in TARGETS]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def load(folder: Path, wanted: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    for run in wanted:
        path = folder / f"{run.name}.json"
        if path.exists():
            found.append({**json.loads(path.read_text()), "task": run.task})
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is missing, one file a run, and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few short runs, writes nothing")
    parser.add_argument("--report", action="store_true", help="from the runs there are")
    parser.add_argument("--folder", type=Path, default=RUNS, help="of the runs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    wanted = grid(options.quick)
    options.folder.mkdir(parents=True, exist_ok=True)
    missing = [r for r in wanted if not (options.folder / f"{r.name}.json").exists()]
    for run in tqdm([] if options.report else missing):
        found = execute(run)
        (options.folder / f"{run.name}.json").write_text(json.dumps(found, allow_nan=True))
    text = report(load(options.folder, wanted))
    print(text)
    if not options.quick:
        OUT.write_text(text)


if __name__ == "__main__":
    main()
