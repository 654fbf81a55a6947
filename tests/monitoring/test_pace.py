"""What an adaptive schedule may cost where nobody has asked for more: a tenth of the work."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp

import geomwatch
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
    with geomwatch.Monitor(model, cross_entropy, optimizer, **options) as monitor:
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


def work(monitor: geomwatch.Monitor) -> float:
    """Steps' worth of the probes but the dear ones: two gradients, and 2.2 steps a product."""
    return sum(
        2 + 2.2 * r.provenance["hvps"] for r in monitor.history if "roughness" not in fresh(r)
    )


def fresh(record: geomwatch.Record) -> set[str]:
    return {name for name, e in record.estimates.items() if e.age == 0 and e.value is not None}


def test_the_probes_of_a_run_need_less_than_a_tenth_of_its_work():
    monitor = trained(1500)
    steps = [r.step for r in monitor.history]
    assert steps[0] == 0
    assert len(steps) >= 4  # and what there is is used
    assert work(monitor) + 0.5 * 1500 / 20 <= 0.1 * 1500


def test_what_is_dear_waits_for_a_thousand_steps():
    monitor = trained(1500)
    (dear,) = [r.step for r in monitor.history if "roughness" in fresh(r)]
    assert dear >= 1000


@pytest.mark.parametrize("options", [{"every": 99}, {"max_overhead": 50.0}])
def test_who_asks_for_more_gets_it(options):
    assert [r.step for r in trained(9, **options).history] == [0, 1, 2, 3, 5, 8]


def test_a_jump_of_the_rate_is_probed_at_any_price():
    first, at_jump = trained(40, jump=30).history
    assert (first.step, at_jump.step) == (0, 30)
    # what a start bears and a jump survives depends on the noise
    assert {"stochastic_margin"} <= fresh(first) & fresh(at_jump)


def test_a_start_beyond_the_limit_is_probed_at_any_price():
    found = [r for r in trained(30, lr=20.0).history if r.step]
    assert [r.step for r in found] == [1, 2, 3, 5, 8]
    assert min(r["stability_margin"].value for r in found[:-1]) > 1


@pytest.fixture
def looks(monkeypatch):
    """The steps at which a sentinel looks."""
    steps: list[int] = []
    monitor_glance = geomwatch.Monitor._glance

    def noted(self: geomwatch.Monitor, *arguments: Any) -> bool:
        steps.append(self._counter.steps)
        return monitor_glance(self, *arguments)

    monkeypatch.setattr(geomwatch.Monitor, "_glance", noted)
    return steps


def test_sentinels_go_on_where_probes_are_too_dear(looks):
    trained(60)
    assert looks[:5] == [1, 2, 3, 5, 8]
    assert max(b - a for a, b in itertools.pairwise(looks)) <= 11


def test_a_start_is_looked_at_however_little_time_there_is(looks):
    monitor = trained(60, max_overhead=1e-9)
    assert [r.step for r in monitor.history] == [0]
    assert looks == [1, 2, 3, 5, 8]


def test_only_the_first_looks_ask_which_weights_are_scale_invariant(looks, monkeypatch):
    asked = []
    update = ScaleInvariance.update

    def noted(self: ScaleInvariance, *arguments: Any) -> frozenset[str]:
        asked.append(len(looks))
        return update(self, *arguments)

    monkeypatch.setattr(ScaleInvariance, "update", noted)
    trained(60)
    assert len(looks) > 6
    assert asked == [0, 1, 2, 3, 4, 5]  # the first probe, and the looks of the start


def test_a_resumed_run_pays_for_what_was_spent_before():
    whole = [r.step for r in trained(800).history]
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batches = minibatches()
    first = geomwatch.Monitor(model, cross_entropy, optimizer)
    go_on(first, model, optimizer, itertools.islice(batches, 300))
    state = first.state_dict()
    first.close()
    second = geomwatch.Monitor(model, cross_entropy, optimizer)
    second.load_state_dict(state)
    go_on(second, model, optimizer, itertools.islice(batches, 500))
    found = [r.step for r in (*first.history, *second.history)]
    assert found[:2] == [0, 300]  # the first look after a resume
    assert all(step > whole[1] for step in found[2:])  # is paid for


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
    assert len(monitor.history) == 1


def test_full_batch_training_is_probed_more_often():
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    go_on(monitor, model, optimizer, itertools.repeat(digits(64), 400))
    assert len(trained(400).history) == 1
    assert len(monitor.history) == 2
    assert work(monitor) < 0.2 * 400
