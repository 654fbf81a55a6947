"""Which early numbers go along with how a run ends: rank correlations, alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from studies.inference import Floats, Interval, correlation
from studies.table import Table

NAMES = {
    "lambda_max": "λ_max",
    "train_filter_variance": "R",
    "trace_per_param": "tr/D",
    "ggn_effective_rank": "r_eff",
    "normalized_sharpness": "NS",
    "barrier_height": "B (height)",
    "trace": "tr",
    "spectral_gap": "gap",
    "normalized_sharpness_linf": "NS∞",
    "train_filter_rest": "rest",
    "difficulty": "difficulty",
    "grad_norm": "gradient norm",
    "loss": "loss",
}
SIGNATURES = {
    "(λ_max, R, tr/D)": ("lambda_max", "train_filter_variance", "trace_per_param"),
    "(λ_max, R, tr/D, r_eff, NS, B)": tuple(list(NAMES)[:6]),
    "the loss alone": ("loss",),
}
TARGETS = {
    "steps_to_target": "steps to the target",
    "barrier_height": "barrier at the end",
    "test_gap": "test gap",
}
_RIDGE = 1.0  # in units of the ranks' own variance


@dataclass(frozen=True)
class Runs:
    """The runs on images, all variants: a row each."""

    configurations: tuple[str, ...]
    architectures: tuple[str, ...]
    columns: dict[tuple[str, str], tuple[float | None, ...]]  # (quantity, stage)

    def known(self, *keys: tuple[str, str]) -> tuple[Floats, list[int]]:
        """Return the columns where none of them is missing, (n, k), and which rows these are."""
        rows = list(zip(*(self.columns[key] for key in keys), strict=True))
        chosen = [i for i, row in enumerate(rows) if None not in row]
        return np.array([rows[i] for i in chosen], dtype=np.float64).reshape(-1, len(keys)), chosen


@dataclass(frozen=True)
class Found:
    """The correlation of something with a target: over all runs, and within each net's own."""

    pooled: Interval | None
    within: Interval | None
    runs: int


def runs_of(table: Table) -> Runs:
    """Collect early and last numbers and the targets of all runs on images."""
    cases = [c for c in (*table.plain, *table.variants) if c.kind == "images"]
    rows = [(case, seed) for case in cases for seed in table.settings.seeds]
    keys = [(name, stage) for name in NAMES for stage in ("early", "end")]
    keys += [(name, "end") for name in TARGETS if (name, "end") not in keys]
    return Runs(
        tuple(case.name for case, _ in rows),
        tuple(case.architecture for case, _ in rows),
        {(q, s): tuple(table.of_seed(c, q, s, seed) for c, seed in rows) for q, s in keys},
    )


def correlate(runs: Runs, quantity: str, target: str, *, stage: str, resamples: int) -> Found:
    """Correlate one quantity at a stage with what the runs end in."""
    columns, rows = runs.known((quantity, stage), (target, "end"))
    return _found(runs, columns[:, 0].tolist(), columns[:, 1].tolist(), rows, resamples)


def predict(runs: Runs, signature: Sequence[str], target: str, *, by: str, resamples: int) -> Found:
    """Correlate a target with its prediction from early ranks together, on runs left out.

    Ridge regression of the target's ranks on the ranks of the quantities, fitted without the runs
    of one configuration at a time (`by` "configuration") or of one architecture; then Spearman's
    correlation of target and prediction.
    """
    keys = [(name, "early") for name in signature]
    columns, rows = runs.known(*keys, (target, "end"))
    labels = runs.configurations if by == "configuration" else runs.architectures
    own = np.array([labels[i] for i in rows])
    if len(set(own)) < 2:
        return Found(None, None, len(rows))
    guess = np.empty(len(rows))
    for label in sorted(set(own)):
        held = own == label
        guess[held] = _fitted(columns[~held], columns[held, :-1])
    return _found(runs, guess.tolist(), columns[:, -1].tolist(), rows, resamples)


def _fitted(known: Floats, new: Floats) -> Floats:
    """Predict the rank of the last column from the others, for new rows of these."""
    x, y = known[:, :-1], stats.rankdata(known[:, -1])
    ranks = _standard(stats.rankdata(x, axis=0), len(x))
    places = np.stack(
        [
            np.searchsorted(np.sort(x[:, j]), new[:, j]) + 0.5  # a rank among the known
            for j in range(x.shape[1])
        ],
        axis=1,
    )
    penalty = _RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(ranks.T @ ranks + penalty, ranks.T @ (y - y.mean()))
    guess: Floats = _standard(places, len(x)) @ weights + y.mean()
    return guess


def _standard(ranks: Floats, count: int) -> Floats:
    """Ranks among so many, to mean 0 and variance 1."""
    return (ranks - (count + 1) / 2) / np.sqrt((count**2 - 1) / 12)


def _found(
    runs: Runs, x: Sequence[float], y: Sequence[float], rows: Sequence[int], resamples: int
) -> Found:
    groups = [runs.configurations[i] for i in rows]
    strata = [runs.architectures[i] for i in rows]
    pooled = correlation(x, y, groups, resamples=resamples)
    within = correlation(x, y, groups, strata=strata, resamples=resamples)
    return Found(pooled, within, len(rows))
