"""Clipped runs that train well are left in peace, and those that fail are warned of."""

from __future__ import annotations

import pytest
from changing.clipped import Clipped, alerts
from clipped_runs import OUT, Row, page

HEALTHY = [
    Clipped("tanh", "SGD", 2.0, 0.05),
    Clipped("tanh", "momentum", 0.8, 0.05),
    Clipped("tanh", "AdamW", 0.1, 0.05),
]
FAILED = [Clipped("tanh", "SGD", 128.0, 0.05), Clipped("tanh", "momentum", 12.8, 0.2)]


@pytest.mark.parametrize("run", HEALTHY, ids=lambda run: run.optimizer)
def test_a_healthy_clipped_run_is_left_in_peace(run: Clipped):
    assert alerts(run) == []


@pytest.mark.parametrize("run", FAILED, ids=lambda run: run.optimizer)
def test_a_clipped_run_that_fails_is_warned_of(run: Clipped):
    assert Row(run, "failed", alerts(run)).of_margin


def test_the_page_counts_healthy_and_failed_runs_and_names_those_warned_of():
    rows = [
        Row(HEALTHY[0], "healthy", ["stability_margin warning at 3"]),
        Row(HEALTHY[0], "healthy", ["loss_rise warning at 3"]),
        Row(FAILED[0], "failed", []),
    ]
    written = page(rows)
    assert "| SGD | 0.05 to 1 | 2 | 1 | 2 | 1 | 0 | 0 |" in written
    assert "| tanh | SGD | 2 | 0.05 | raw | stability_margin warning at 3 |" in written


def test_in_the_page_clipped_failures_are_announced_but_for_those_it_names():
    rows = [line.split(" | ") for line in OUT.read_text(encoding="utf-8").splitlines()]
    clipped = [r for r in rows if len(r) == 8 and r[1] == "0.05 to 1"]
    silent = [r for r in rows if len(r) == 5 and r[4].strip(" |") in ("raw", "Lightning")]
    failed, announced = (sum(int(r[i].strip(" |")) for r in clipped) for i in (5, 7))
    assert failed >= 20
    assert announced == failed - len(silent) >= 0.9 * failed
    assert sum(int(r[2]) - int(r[3]) for r in clipped) >= 30
