"""Calls in the wrong place and options that cannot work are refused, with what to do."""

from __future__ import annotations

import logging

import pytest
import torch
from faces import faced
from loops import small, train
from problems import cross_entropy, digits

from geomwatch import Monitor, UsageError


def test_a_call_without_gradients_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    with pytest.raises(UsageError, match=r"must find gradients, got none.*after loss.backward\(\)"):
        monitor.step(digits(8))


def test_a_call_after_the_optimizer_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, digits(8)).backward()
    optimizer.step()
    with pytest.raises(UsageError, match=r"must come before optimizer.step\(\), got a gradient"):
        monitor.step(digits(8))


def test_a_call_without_a_batch_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, digits(8)).backward()
    with pytest.raises(UsageError, match=r"must know the batch, got none.*observe\(batch\)"):
        monitor.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": cross_entropy}, r"model must be a torch.nn.Module, got _Supervised"),
        ({"loss_fn": 3}, r"loss_fn must be callable as loss_fn\(model, batch\), got int"),
        ({"mode": "test"}, r'mode must be "train" or "eval", got \'test\''),
        ({"every": 0}, r"every must be an integer >= 1, got 0"),
        ({"schedule": "fixed"}, r"Write:\n    Monitor\(model, loss_fn, optimizer, every=100\)"),
        ({"budget": 0}, r"budget must be a share .* got 0"),
        ({"budget": "5%"}, r"budget must be a share .* got '5%'"),
        ({"budget": 5}, r"budget must be a share .* got 5\. .*\n    budget=0\.05"),
        ({"quantities": ["sharpness"]}, r"list of known names, got 'sharpness'"),
    ],
)
def test_an_option_that_cannot_work_is_refused_at_construction(options, message):
    model, optimizer = small()
    arguments = {"model": model, "loss_fn": cross_entropy, "optimizer": optimizer, **options}
    with pytest.raises(UsageError, match=message):
        Monitor(**faced(arguments))


def test_a_loss_for_each_item_is_refused():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, digits(8)).backward()
    with pytest.raises(UsageError, match=r"loss and grad_norm must be scalars .* got shape \(8,\)"):
        monitor.step(digits(8), loss=torch.zeros(8))


@pytest.mark.parametrize(("steps", "told"), [(10, True), (11, False)])
def test_a_run_that_ends_before_its_second_probe_is_told_of(caplog, steps, told):
    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer, every=10) as monitor:
        train(model, optimizer, monitor, steps)
        assert not caplog.records
    monitor.close()
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert messages == told * [
        "every must be smaller than the run, got every=10 for 10 steps: only the first was probed. "
        "Pass every=1, say, or leave it out."
    ]
