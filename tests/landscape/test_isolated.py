"""Minima that are flat and walled off, on nets that were really trained."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import nn

import geomwatch
from geomwatch.errors import UsageError
from geomwatch.landscape import Barrier, barrier, judge_isolation
from geomwatch.records import Estimate, Record

SHARPNESS = "normalized_sharpness_linf"


def trained(seed: int, steps: int, start: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model = mlp(64, 64, 10) if start is None else copy.deepcopy(start)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    inputs, targets = digits(1797)
    for _ in range(steps):
        pick = torch.randint(0, len(inputs), (64,))
        optimizer.zero_grad()
        cross_entropy(model, (inputs[pick], targets[pick])).backward()
        optimizer.step()
    return model


def between(a: nn.Module, b: nn.Module, **options: Any) -> tuple[Record, Barrier]:
    batch = digits(512)
    record = geomwatch.measure(
        a, cross_entropy, batch, how=geomwatch.Measurement(quantities=[SHARPNESS], mode="eval")
    )
    states = [copy.deepcopy(m.state_dict()) for m in (a, b)]
    return record, barrier(a, *states, cross_entropy, [batch], points=11, **options)


def test_two_seeds_are_walled_off_and_two_branches_of_a_run_are_not():
    one, other = trained(0, 300), trained(1, 300)
    record, found = between(one, other)
    alert = judge_isolation(record, found)
    assert alert is not None
    assert (alert.rule, alert.severity, alert.value) == ("flat_but_isolated", "info", found.height)
    assert alert.limit == pytest.approx(20 * record[SHARPNESS].value)

    trunk = trained(0, 150)
    record, found = between(trained(1, 150, trunk), trained(2, 150, trunk))
    assert judge_isolation(record, found) is None


def made(
    height: float | None, *, sharpness: float | None = 0.01, ends: float = 0.1, **more: Any
) -> tuple[Record, Barrier]:
    reason = "below the noise" if sharpness is None else ""
    estimates = {SHARPNESS: Estimate(sharpness, reason=reason)}
    record = Record(step=7, loss=ends, lr=(), seconds=0.0, estimates=estimates)
    path = np.zeros(3)
    found = Barrier(
        alphas=path,
        losses=path,
        path="linear",
        aligned=False,
        loss_a=ends,
        loss_b=ends,
        max_loss=height,
        argmax=0.5,
        height=height,
        argmax_height=0.5,
        nonfinite=0,
        straight=path,
        provenance={},
    )
    return record, replace(found, **more)


def test_a_wall_counts_from_twenty_times_the_sharpness():
    assert judge_isolation(*made(0.19)) is None
    assert judge_isolation(*made(0.21)) is not None
    assert judge_isolation(*made(0.21), wall=30) is None


def test_a_wall_that_adds_little_to_the_loss_is_none():
    assert judge_isolation(*made(0.21, ends=2.0)) is not None
    assert judge_isolation(*made(0.21, ends=2.2)) is None
    assert judge_isolation(*made(1e-9, sharpness=0.0)) is None


def test_the_message_says_what_to_do():
    alert = judge_isolation(*made(0.5))
    assert alert is not None
    assert alert.message == (
        "flat but isolated: moving each weight by 1 % of itself adds at most 0.01 to the loss, but "
        "the way to the other solution (linear, not aligned) leads over a wall of 0.5, 50 x that "
        "(told from 20 x), between ends at 0.1 and 0.1. Expect other seeds to end elsewhere: "
        "report several, and don't average these weights. Mere permutations of units make such "
        "walls: measure again with align=True. More: geomwatch explain flat_but_isolated."
    )
    aligned = judge_isolation(*made(0.5, aligned=True))
    assert aligned is not None
    assert "bend=True looks for a way around" in aligned.message


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (made(None), "barrier must have a height, got a path without a finite loss"),
        (made(1.0, sharpness=None), f"record must hold a value of {SHARPNESS}, got none: below"),
    ],
)
def test_what_has_no_value_is_refused(case, words):
    with pytest.raises(UsageError, match=words):
        judge_isolation(*case)


def test_a_record_without_the_sharpness_is_refused():
    record, found = made(1.0)
    with pytest.raises(UsageError, match=r"record must hold .*, got loss\. Measure it with"):
        judge_isolation(replace(record, estimates={"loss": Estimate(1.0)}), found)
    with pytest.raises(UsageError, match=r"wall must be positive, got -1"):
        judge_isolation(record, found, wall=-1)
