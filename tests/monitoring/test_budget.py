"""What a monitor may cost, and what it does with it."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import problems
import pytest
import torch
from faces import faced
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.controllers import LearningRateCap
from geomwatch.monitoring.safe_prober import SafeProber
from geomwatch.stability.scale_invariance import ScaleInvariance


def minibatches():
    inputs, targets = digits(1024)
    return itertools.cycle(list(zip(inputs.split(64), targets.split(64), strict=True)))


def trained(
    steps: int, *, jump: int | None = None, lr: float = 0.02, **options: Any
) -> geomwatch.Monitor:
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    batches = minibatches()
    with geomwatch.Monitor(model, cross_entropy, optimizer, **faced(options)) as monitor:
        go_on(monitor, model, optimizer, itertools.islice(batches, steps), jump=jump)
    return monitor


def go_on(monitor: Any, model: Any, optimizer: Any, batches: Any, *, jump: int | None = None):
    for step, batch in enumerate(batches):
        if step == jump:
            optimizer.param_groups[0]["lr"] *= 2.5
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()


@pytest.fixture
def clock(monkeypatch):
    """A clock of the test's own: a training step takes a second, an evaluation in a probe .25."""
    now = [0.0]
    monkeypatch.setattr("geomwatch.monitoring.budget.clock", lambda: now[0])
    monkeypatch.setattr(sys.modules[__name__], "cross_entropy", costing(now))
    return now


def costing(now: list[float]) -> Any:
    def loss_fn(model: Any, batch: Any) -> torch.Tensor:
        now[0] += 0.25 if geomwatch.is_probing() else 1.0
        return problems.cross_entropy(model, batch)

    return loss_fn


def fresh(record: geomwatch.Record) -> set[str]:
    return {name for name, e in record.estimates.items() if e.age == 0 and e.value is not None}


def last_probe(monitor: geomwatch.Monitor, before: int) -> int:
    return max(r.step for r in monitor.history if r.step < before)


@pytest.mark.parametrize("budget", [0.01, 0.02])
def test_all_that_is_spent_stays_within_the_budget_but_for_one_probe(clock, budget):
    monitor = trained(1000, budget=budget)
    training = clock[0] - monitor.seconds
    assert training == 1000.0
    dearest = 12.0  # evaluations of the first probe, at a quarter of a second
    assert monitor.seconds <= budget * training + dearest
    assert monitor.seconds >= 0.5 * budget * training  # nor is it left unused
    assert monitor.overhead == pytest.approx(monitor.seconds / training, rel=0.01)
    for record in monitor.history[1:]:
        told = record.scalars()["geom/overhead"]
        assert 0 < told == record.overhead <= budget + 2 * dearest / record.step


def test_more_budget_is_more_probes(clock):
    few, many, free = (len(trained(600, budget=b).history) for b in (0.05, 0.2, None))
    assert 1 <= few < many < free


def test_an_interval_that_is_given_alone_is_kept_whatever_it_costs(clock):
    assert [r.step for r in trained(100, every=10).history] == list(range(0, 100, 10))


def test_of_an_interval_and_a_budget_the_stricter_holds(clock):
    both = [r.step for r in trained(400, every=10, budget=0.1).history]
    assert both[0] == 0
    assert len(both) < 40
    assert [r.step for r in trained(400, every=100, budget=1.0).history] == [0, 100, 200, 300]


def test_the_default_is_two_percent(clock):
    monitor = trained(300)
    assert monitor._account.budget == 0.02
    assert [r.step for r in monitor.history] == [0]  # its price is that of 600 steps


def test_what_is_dear_waits_for_a_thousand_steps():
    monitor = trained(1500)
    (dear,) = [r.step for r in monitor.history if "roughness" in fresh(r)]
    assert dear >= 1000


def test_a_start_that_can_be_paid_for_is_probed_densely():
    assert [r.step for r in trained(9).history] == [0, 1, 2, 3, 5, 8]


def test_with_a_controller_work_is_counted_and_no_clock_is_asked(monkeypatch):
    def steps() -> list[int]:
        monitor = trained(400, budget=0.1, controllers=LearningRateCap())
        return [r.step for r in monitor.history]

    once = steps()
    wild = itertools.count(step=1000.0)
    monkeypatch.setattr("geomwatch.monitoring.budget.clock", lambda: next(wild))
    assert steps() == once
    assert once[0] == 0


def test_a_jump_of_the_rate_is_probed_at_any_price(clock):
    first, at_jump = trained(40, jump=30, budget=1e-9).history
    assert (first.step, at_jump.step) == (0, 30)
    # what a start bears and a jump survives depends on the noise
    assert {"stochastic_margin"} <= fresh(first) & fresh(at_jump)


def test_a_start_beyond_the_limit_is_probed_at_any_price(clock):
    found = [r for r in trained(30, lr=20.0, budget=1e-9).history if r.step]
    assert [r.step for r in found] == [1, 2, 3, 5, 8]
    assert min(r["stability_margin"].value for r in found[:-1]) > 1


@pytest.fixture
def looks(monkeypatch):
    """The steps at which a sentinel looks."""
    steps: list[int] = []
    glance = SafeProber.glance

    def noted(self: SafeProber, window: Any, step: int, *rest: Any, **known: Any) -> bool:
        steps.append(step)
        return glance(self, window, step, *rest, **known)

    monkeypatch.setattr(SafeProber, "glance", noted)
    return steps


def test_sentinels_go_on_where_probes_are_too_dear(looks, clock):
    trained(60)
    assert looks[:5] == [1, 2, 3, 5, 8]
    assert all(b - a <= max(10, a / 2) + 1 for a, b in itertools.pairwise(looks))


def test_only_the_first_looks_ask_which_weights_are_scale_invariant(looks, clock, monkeypatch):
    asked = []
    update = ScaleInvariance.update

    def noted(self: ScaleInvariance, *arguments: Any) -> frozenset[str]:
        asked.append(len(looks))
        return update(self, *arguments)

    monkeypatch.setattr(ScaleInvariance, "update", noted)
    trained(60)
    assert len(looks) > 6
    assert asked == [0, 1, 2, 3, 4, 5]  # the first probe, and the looks of the start


def test_full_batch_training_is_known_from_the_second_look():
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    seen: list[bool] = []

    class Listening(geomwatch.rules.NonFinite):
        def __call__(self, observation: Any) -> None:
            seen.append(observation.same_data)

    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, rules=[Listening()])
    go_on(monitor, model, optimizer, itertools.repeat(digits(256), 5))
    assert seen == [False, True, True, True, True]
