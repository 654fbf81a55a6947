"""Probes that fail or are interrupted leave no trace either."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import cross_entropy, mlp
from states import assert_same, everything, seed
from torch import Tensor, nn
from undisturbed import NETS, STEPS

import geomwatch
from geomwatch.curvature.objective import Objective


def fails_at(evaluation: int, error: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    """A loss_fn that raises at an evaluation of a probe, after the model has run."""
    seen = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        loss = cross_entropy(model, batch)
        if geomwatch.is_probing():
            seen += 1
            if seen == evaluation:
                seen = 0
                raise error
        return loss

    return loss_fn


@pytest.mark.parametrize("evaluation", [1, 2])
def test_training_is_bit_identical_when_every_probe_fails(evaluation, caplog):
    net = NETS["BatchNorm, dropout and other generators"]

    def run(watch: bool) -> tuple[dict[str, Any], geomwatch.Monitor]:
        seed(0)
        model = net.make()
        optimizer = torch.optim.Adam(model.parameters())
        loss_fn = fails_at(evaluation, OSError("the disk has gone"))
        monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for _ in range(2):
                batch = net.batch()
                monitor.observe(batch)
                (loss_fn(model, batch) / 2).backward()
            if watch:
                monitor.step()
            optimizer.step()
        return everything(model, optimizer), monitor

    with caplog.at_level(logging.WARNING, "geomwatch"):
        without, _ = run(watch=False)
        with_it, monitor = run(watch=True)
    assert_same(without, with_it)
    assert monitor.history == []
    assert [m for m in caplog.messages if "the disk has gone" in m]


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), MemoryError("stop")])
def test_an_error_passes_through_a_measurement_and_leaves_everything_as_it_was(evaluation, error):
    net = NETS["BatchNorm, dropout and other generators"]
    model = net.make()
    cross_entropy(model, net.batch()).backward()
    loss_fn = fails_at(evaluation, error)
    window = [net.batch(), net.batch()]
    before = everything(model)
    with pytest.raises(type(error), match="stop"), Objective(model, loss_fn, window) as objective:
        objective.gradient()
    assert_same(before, everything(model))
    assert not geomwatch.is_probing()


def test_an_interrupt_inside_a_monitors_probe_reaches_the_user():
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, fails_at(1, KeyboardInterrupt("stop")), optimizer)
    cross_entropy(model, batch).backward()
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        monitor.step(batch)
    assert_same(before, everything(model, optimizer))
