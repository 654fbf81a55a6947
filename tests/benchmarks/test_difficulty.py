"""The benchmark of the paper's H5: its statistics on data whose answer is known."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from difficulty import SETS, Run, execute, predictions, ranks, score, table, verdict


def made(signal: float) -> list[dict[str, Any]]:
    """Runs whose outcome is the rate and, by `signal`, the margin."""
    rng = np.random.default_rng(0)
    runs = []
    for task, _ in itertools.product(("a", "b", "c", "d"), range(25)):
        rate, margin = rng.normal(size=2)
        outcome = 0.3 * rate + signal * margin + 0.1 * rng.normal()
        runs.append(
            {
                "task": task,
                "log_rate": rate,
                "log_rate_squared": rate**2,
                "loss": rng.normal(),
                "grad_norm": rng.normal(),
                "stability_margin": margin,
                "trace_per_param": rng.normal(),
                "roughness_residual": rng.normal(),
                "effective_rank": None,
                "early": rng.normal(),
                "left": outcome,
                "steps": outcome,
                "remaining": outcome,
            }
        )
    return runs


def test_a_quantity_that_tells_is_found_and_one_that_does_not_is_not():
    _, gains = table(made(1.0), 100)
    assert gains["left"][0] > 0.3
    assert verdict(gains["left"]).startswith("early curvature adds to")
    _, none = table(made(0.0), 100)
    assert none["left"][1] <= 0
    assert not verdict(none["left"]).startswith("early curvature adds to")


def test_an_architecture_is_predicted_without_its_own_runs():
    runs = made(1.0)
    plain = predictions(runs, SETS["geo"], "left")
    for r in runs[:25]:
        r["left"] = -r["left"]  # what "a" comes to must not matter for its own prediction
    moved = predictions(runs, SETS["geo"], "left")
    assert np.allclose(plain[:25], moved[:25])
    assert not np.allclose(plain[25:], moved[25:])


def test_ranks_put_infinity_last_and_the_missing_in_the_middle():
    runs = [{"x": 1.0}, {"x": float("inf")}, {"x": None}, {"x": 3.0}, {"x": 2.0}]
    assert ranks(runs, "x")[1] == max(ranks(runs, "x"))
    assert ranks(runs, "x")[2] == pytest.approx(ranks(runs, "x")[4])


def test_a_perfect_prediction_scores_one():
    runs = made(0.5)
    truth = np.array([r["left"] for r in runs])
    assert score(runs, truth, "left", np.arange(len(runs))) == pytest.approx(1.0)


def test_a_run_knows_early_quantities_and_what_came_of_it(needs_data):
    found = execute(Run("mlp-digits", 1.0, 1.0, 0, steps=30))
    assert found["stability_margin"] > 0
    assert found["early"] > 0
    assert found["remaining"] >= 0
    assert 0 < found["steps"] <= 30
    assert not found["diverged"]
