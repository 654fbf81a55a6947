"""Batch noise of a start: its level, by optimizer and step, and the rule on it."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch
from observations import Watched, brief, heard, measured
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.observation.batch_noise import noise_part
from geomwatch.records import Estimate
from geomwatch.rules import BatchNoise, Observation, PlannedRate


def start(step: int, noise: float | None, margin: float = 0.05, **more: Any) -> Observation:
    """A probe has found so much noise beside a margin."""
    error = more.pop("error", 0.02)
    whole = None if noise is None else margin + noise
    estimates = {
        "stability_margin": Estimate(margin),
        "stochastic_margin": Estimate(whole, error, "stderr"),
    }
    return measured(step, margin, estimates=estimates, items=16, **more)


def calm(step: int, **more: Any) -> Observation:
    return measured(step, 0.05, **more)


def test_a_start_whose_batches_disagree_is_warned_of_at_the_second_step():
    (alert,) = heard(BatchNoise(), [start(0, 1.0), calm(1)])
    assert (alert.severity, alert.step, alert.limit) == ("warning", 0, 0.3)
    assert alert.value == pytest.approx(1.0)
    assert "Batches of 16 disagree too much on the curvature" in alert.message
    assert "they add 1 ± 0.02 to the stability margin (alert above 0.3" in alert.message
    assert "the margin itself is 0.05 with SGD" in alert.message
    assert "Start again at a learning rate of about 0.01 (0.1 x)" in alert.message
    assert alert.message.endswith("More: geomwatch explain batch_noise.")
    (later,) = heard(BatchNoise(), [start(5, 1.0)])
    assert "Start again at a learning rate of about 0.01 (0.1 x)" in later.message


def test_much_noise_is_told_of_before_the_first_step_and_none_of_full_batches():
    rule = Watched(BatchNoise())
    assert rule(start(0, 1.1)) is not None
    assert rule(calm(1)) is None
    assert heard(BatchNoise(), [start(0, 0.99, margin=0.06), calm(1, same_data=True)]) == []


@pytest.mark.parametrize(
    "seen",
    [
        start(5, 0.98),  # the sum is beyond 1, not its lower bound
        start(11, 30.0),  # later it is no matter of a start
        start(5, None),
        start(5, 0.5, error=0.6),  # noise of the noise
        start(5, 30.0, same_data=True),
        start(5, 30.0, status="unknown"),
        start(5, 1.7, adaptive=True),
        start(0, 3.9, margin=0.7, adaptive=True),
        start(0, 190.0, margin=0.2, adaptive=True),  # a fresh head on a pretrained net
        measured(5, 0.5),
    ],
)
def test_all_else_is_passed_over(seen):
    assert heard(BatchNoise(), [seen]) == []


@pytest.mark.parametrize("seen", [start(5, 1.9, adaptive=True), start(1, 4.1, 0.61, adaptive=True)])
def test_methods_that_adapt_have_levels_of_their_own(seen):
    assert brief(heard(BatchNoise(), [seen])) == [(seen.index, "warning")]


def test_methods_that_adapt_ruin_nothing_in_one_step_and_always_wait():
    first = start(0, 190.0, 0.8, adaptive=True)
    rule = Watched(BatchNoise())
    assert rule(first) is None
    assert rule(calm(1)) is not None
    assert heard(BatchNoise(), [first, calm(1, same_data=True)]) == []


def test_advice_asks_for_no_less_noise_than_the_level_does():
    """Where both N and M have to be high, either may come down."""
    (young,) = heard(BatchNoise(), [start(1, 30.0, 1.5, adaptive=True)])
    assert "(0.1 x)" in young.message
    (settled,) = heard(BatchNoise(), [start(5, 30.0, 1.5, adaptive=True)])
    assert "(0.017 x)" in settled.message


def test_it_is_said_once_and_remembered():
    rule, again = BatchNoise(), BatchNoise()
    assert rule(start(0, 1.0)) is None
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again(calm(1)) == rule(calm(1)) is not None
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert heard(again, [start(8, 5.0)]) == []


def test_noise_counts_at_the_planned_peak():
    """It is said at the second step, when full-batch training has shown itself."""
    first = start(0, 0.05, 0.01, error=0.002, peak=(2.0,))  # 20 x the first rate
    assert brief(heard(BatchNoise(), [first])) == []
    (alert,) = heard(PlannedRate(), [first, measured(1, 0.01)])
    assert (alert.severity, alert.step, alert.value) == ("warning", 0, pytest.approx(1.0))
    assert "would add 1 to the stability margin there" in alert.message
    assert "Lower the peak of the schedule from 2 to about 0.2 (0.1 x)" in alert.message
    assert heard(PlannedRate(), [first, measured(1, 0.01, same_data=True)]) == []
    small = start(0, 0.042, 0.01, error=0.002, peak=(2.0,))
    assert heard(PlannedRate(), [small, measured(1, 0.01)]) == []


def test_noise_at_the_peak_of_methods_that_adapt_needs_a_margin_beside_it():
    noisy = start(0, 0.3, 0.02, peak=(2.0,), adaptive=True)  # at the peak 6, and a margin of .4
    assert heard(PlannedRate(), [noisy, measured(1, 0.01)]) == []
    both = start(0, 0.3, 0.04, peak=(2.0,), adaptive=True)
    assert len(heard(PlannedRate(), [both, measured(1, 0.01)])) == 1


def run(lr: float, size: int, kind: Any = torch.optim.SGD, **options: Any) -> geomwatch.Monitor:
    torch.manual_seed(0)
    model = mlp(64, 64, 64, 10)
    optimizer = kind(model.parameters(), lr=lr, **options)
    inputs, targets = digits(1024)
    batches = itertools.cycle(list(zip(inputs.split(size), targets.split(size), strict=True)))
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    for batch in itertools.islice(batches, 12):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()
    return monitor


@pytest.mark.parametrize("size", [4, 16, 64])
def test_rates_far_too_large_are_warned_of_at_once_and_good_ones_never(size):
    scale = size / 16  # noise falls with the batch
    wild = run(1.6 * scale, size, momentum=0.9)
    assert [a.step for a in wild.alerts if a.rule == "batch_noise"] == [0]
    calm = run(0.02 * scale, size, momentum=0.9)
    assert calm.alerts == []
    assert batch_noise_of(calm) == pytest.approx(0.0125 * batch_noise_of(wild), rel=1e-3)


def batch_noise_of(monitor: geomwatch.Monitor) -> float:
    first = monitor.history[0]
    return first["stochastic_margin"].value - first["stability_margin"].value


def test_a_noisy_start_is_looked_at_again_and_a_calm_one_is_not(clock_that_runs):
    noisy = run(0.05, 16, torch.optim.AdamW)
    assert {0, 5} <= {r.step for r in noisy.history if not r["stochastic_margin"].age}
    calm = run(0.001, 16, torch.optim.AdamW)
    assert [r.step for r in calm.history] == [0]


def test_what_is_no_noise_is_told_from_it():
    assert noise_part(start(0, 0.5)) is not None
    assert noise_part(start(0, 0.0)) is None
    assert noise_part(start(0, 0.5, margin=-0.1)) is None


def test_batches_of_four_items_are_cut_into_single_ones():
    model = mlp(64, 16, 10)
    record = geomwatch.measure(
        model,
        cross_entropy,
        digits(4),
        how=geomwatch.Measurement(quantities=["stability_margin", "stochastic_margin"]),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    )
    found = record["stochastic_margin"]
    assert found.value is not None
    assert math.isfinite(found.value)
    assert found.value >= record["stability_margin"].value
