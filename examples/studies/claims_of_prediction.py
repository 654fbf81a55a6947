"""The paper's claims about what predicts how a run goes, each with its criterion."""

from __future__ import annotations

import numpy as np

from studies.inference import correlation, number
from studies.ranking import SIGNATURES, Found, Runs, correlate, predict
from studies.table import Table
from studies.verdicts import FAILS, HOLDS, OPEN, Claim, Condition, excludes_zero

_TAUGHT = 0.5  # of the loss at the start: a run that ends above has failed


def of_prediction(table: Table, runs: Runs) -> list[Claim]:
    """Return the claims of sections 1, 5 and 6 on what predicts what, judged."""
    resamples = table.settings.bootstrap

    def single(quantity: str, target: str = "steps_to_target", stage: str = "early") -> Found:
        return correlate(runs, quantity, target, stage=stage, resamples=resamples)

    def joint(name: str) -> Found:
        signature = SIGNATURES[name]
        return predict(runs, signature, "steps_to_target", by="configuration", resamples=resamples)

    triple, whole = (joint(name) for name in list(SIGNATURES)[:2])
    signs = (
        ("lambda_max", "λ_max", True),
        ("ggn_effective_rank", "r_eff", False),
        ("normalized_sharpness", "NS", True),
        ("barrier_height", "barrier", True),
    )
    return [
        Claim(
            "5, 1",
            "Trainability correlates with moderate λ_max, large r_eff, small NS, modest barriers",
            "at 10 % each has a rank correlation with steps to the target whose 95 % interval lies "
            "on the side of 0 that it says, over all runs",
            tuple(excludes_zero(w, single(q).pooled, positive=up) for q, w, up in signs),
        ),
        Claim(
            "5, 1",
            "It correlates with them also among the runs of one architecture",
            "the same for ranks within each architecture",
            tuple(excludes_zero(w, single(q).within, positive=up) for q, w, up in signs),
        ),
        Claim(
            "6.1",
            "H5: early curvature predicts how hard the optimisation is",
            "steps to the target as predicted from (λ_max, R, tr/D) at 10 % correlate with the "
            "true ones, each configuration left out of its own prediction: over all runs, and "
            "within each architecture",
            (
                excludes_zero("all runs", triple.pooled),
                excludes_zero("within an architecture", triple.within),
            ),
        ),
        _jointly(table, runs, whole),
        Claim(
            "1",
            "Basin separability predicts optimization difficulty",
            "the barrier at 10 % has a positive rank correlation with steps to the target, over "
            "all runs and within each architecture",
            (
                excludes_zero("all runs", single("barrier_height").pooled),
                excludes_zero("within an architecture", single("barrier_height").within),
            ),
        ),
        _threshold(table),
        _rough_and_flat(runs, resamples),
    ]


def _jointly(table: Table, runs: Runs, whole: Found) -> Claim:
    singles = [
        (abs(found.value), name, found)
        for name in (*SIGNATURES["(λ_max, R, tr/D, r_eff, NS, B)"], "loss")
        for found in [
            correlate(
                runs, name, "steps_to_target", stage="early", resamples=table.settings.bootstrap
            ).pooled
        ]
        if found is not None
    ]
    if whole.pooled is None or not singles:
        conditions = (Condition(OPEN, "not to be had"),)
    else:
        size, name, best = max(singles)
        verdict = HOLDS if whole.pooled.low > size else OPEN
        verdict = FAILS if whole.pooled.high <= size else verdict
        conditions = (
            Condition(verdict, f"jointly {whole.pooled}, the best alone is {name}: {best}"),
        )
    return Claim(
        "6.2",
        "Not flatness alone, but the joint signature indicates sensitivity early",
        "the six together, each configuration left out of its own prediction, correlate with steps "
        "to the target by more than any of them alone, or the loss: the whole 95 % interval",
        conditions,
    )


def _threshold(table: Table) -> Claim:
    """Judge whether λ_max early tells runs that fail from runs that train."""
    failed: list[float] = []
    trained: list[float] = []
    for case in (*table.plain, *table.variants):
        for seed in table.settings.seeds:
            run = table.run(case, seed)
            end, start = run["train"]["loss"], run["losses"][0]
            early = max(p["lambda_max"] or 0.0 for p in run["probes"][:2])  # the first tenth
            (failed if end is None or end > _TAUGHT * start else trained).append(early)
    verdict = OPEN
    if failed and trained:
        verdict = HOLDS if min(failed) > max(trained) else FAILS
    means = [table.mean(c, "largest_margin").values for c in (*table.plain, *table.variants)]
    margin = max((max(values) for values in means if values), default=float("nan"))
    evidence = (
        f"{len(failed)} of {len(failed) + len(trained)} runs failed; λ_max in the first tenth of a "
        f"run went up to {number(max([*failed, *trained]))}, its stability margin to at most "
        f"{number(margin, 2)} of 1"
    )
    return Claim(
        "6.3",
        "If λ_max > τ early, lower the learning rate",
        "some τ has the runs above it fail (end above half the loss of their start) and those "
        "below train; undecided if no run fails",
        (Condition(verdict, evidence),),
    )


def _rough_and_flat(runs: Runs, resamples: int) -> Claim:
    keys = (
        ("train_filter_variance", "early"),
        ("steps_to_target", "end"),
        ("trace_per_param", "early"),
    )
    columns, rows = runs.known(*keys)
    flat = columns[:, 2] <= np.median(columns[:, 2])
    groups = [runs.configurations[i] for i, is_flat in zip(rows, flat, strict=True) if is_flat]
    found = correlation(
        columns[flat, 0].tolist(), columns[flat, 1].tolist(), groups, resamples=resamples
    )
    return Claim(
        "6.2, 6.3",
        "Where the trace is small, high roughness R still signals trouble",
        "among the half of the runs with the smaller tr/D at 10 %, R has a positive rank "
        "correlation with steps to the target",
        (excludes_zero("R", found),),
    )
