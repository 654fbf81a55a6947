"""The rule on the mean square of the first steps, on observations and in runs."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from observations import brief, heard, measured
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.records import Estimate
from geomwatch.rules import StochasticMargin


def start(step: int, mean_square: float | None, margin: float = 0.5, **more):
    estimates = {
        "stability_margin": Estimate(margin),
        "stochastic_margin": Estimate(mean_square, 0.3, "stderr"),
    }
    return measured(step, margin, estimates=estimates, items=16, **more)


def test_a_start_whose_batches_disagree_is_warned_of():
    (alert,) = heard(StochasticMargin(), [start(5, 7.5)])
    assert (alert.severity, alert.step, alert.value, alert.limit) == ("warning", 5, 7.5, 4.0)
    assert "7.50 ± 0.3" in alert.message or "7.5 ± 0.3" in alert.message
    assert "Start again at a learning rate of about 0.01 (0.13 x)" in alert.message
    assert "make the batch 14 x larger" in alert.message
    assert alert.message.endswith("More: geomwatch explain stochastic_margin.")


@pytest.mark.parametrize(
    "seen",
    [
        start(5, 3.9),
        start(1, 30.0),  # the first step of Adam says little
        start(20, 30.0),  # later it is no matter of a start
        start(5, None),
        start(5, 30.0, deterministic=True),
        start(5, 30.0, status="unknown"),
        measured(5, 0.5),
    ],
)
def test_all_else_is_passed_over(seen):
    assert heard(StochasticMargin(), [seen]) == []


def test_it_is_said_once_and_remembered():
    rule, again = StochasticMargin(), StochasticMargin()
    assert brief(heard(rule, [start(5, 9.0), start(8, 90.0)])) == [(5, "warning")]
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert heard(again, [start(11, 9.0)]) == []


def run(lr: float, size: int) -> geomwatch.Monitor:
    torch.manual_seed(0)
    model = mlp(64, 64, 64, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    inputs, targets = digits(1024)
    batches = itertools.cycle(list(zip(inputs.split(size), targets.split(size), strict=True)))
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    for batch in itertools.islice(batches, 19):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()
    return monitor


def test_rates_far_too_large_are_looked_at_and_warned_of_and_good_ones_are_not():
    wild = run(0.1, 16)
    (alert,) = [a for a in wild.alerts if a.rule == "stochastic_margin"]
    assert alert.step < 20
    calm = run(0.003, 16)
    assert calm.alerts == []
    assert not any("stochastic_margin" in record.estimates for record in calm.history)


def test_batches_of_four_items_are_cut_into_single_ones():
    record = geomwatch.measure(
        model := mlp(64, 16, 10),
        cross_entropy,
        digits(4),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        quantities=["stability_margin", "stochastic_margin"],
    )
    found = record["stochastic_margin"]
    assert found.value is not None
    assert math.isfinite(found.value)
    assert found.value >= record["stability_margin"].value
