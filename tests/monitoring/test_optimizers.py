"""Optimizers of every kind beside a monitor: shared, hand-made, pickled, forgotten."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from loops import DENSE, HandMade, draws, loud, small, train, weights
from problems import cross_entropy, mlp
from torch import Tensor

from geomwatch import Monitor


def test_two_monitors_on_one_optimizer_do_not_disturb_each_other():
    def run(*everys: int) -> tuple[Tensor, list[Monitor]]:
        model, optimizer = small()
        monitors = [Monitor(model, cross_entropy, optimizer, every=every) for every in everys]
        for batch in itertools.islice(draws(), 40):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            for monitor in monitors:
                monitor.step(batch)
            optimizer.step()
        return weights(model), monitors

    bare, _ = run()
    both, pair = run(7, 20)
    assert torch.equal(both, bare)
    for together, every in zip(pair, (7, 20), strict=True):
        _, (alone,) = run(every)
        assert [r.step for r in together.history] == [r.step for r in alone.history]
        for record, other in zip(together.history, alone.history, strict=True):
            assert dict(record.estimates) == dict(other.estimates)


def test_an_optimizer_without_hooks_is_counted_by_calls_and_has_no_known_limit():
    model = mlp(64, 16, 10)
    optimizer = HandMade(model, lr=0.1)
    with Monitor(model, cross_entropy, optimizer) as monitor:
        train(model, optimizer, monitor, 60)
    assert [r.step for r in monitor.history][:6] == DENSE
    for record in monitor.history:
        margin = record["stability_margin"]
        assert margin.status == "unknown"
        assert "no stability formula for HandMade" in margin.reason
        assert margin.value == pytest.approx(0.1 * record["lambda_max"].value, rel=0.05)
    assert not monitor.alerts


def test_a_hand_made_optimizer_that_breaks_down_is_warned_of():
    model = mlp(64, 16, 10)
    optimizer = HandMade(model, lr=0.1)
    monitor = Monitor(model, cross_entropy, optimizer)

    def ramp(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * 1.04 ** max(step - 150, 0)

    train(model, optimizer, monitor, 300, before=ramp)
    assert "stability_margin" in {a.rule for a in loud(monitor.alerts)}


def test_the_optimizer_can_be_copied_and_pickled_while_it_is_watched():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 3)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        twin.zero_grad()
        twin.step()
    train(model, optimizer, monitor, 1)
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]


def test_a_forgotten_monitor_is_freed_although_the_optimizer_lives_on():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 3)
    alive = [weakref.ref(monitor), weakref.ref(monitor._counter)]
    del monitor
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    train(model, optimizer, None, 2)
