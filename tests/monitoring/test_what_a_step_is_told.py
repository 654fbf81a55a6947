"""Loss, gradient norm and scale that the loop passes, and steps that are left out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loops import DENSE, draws, small, train
from problems import cross_entropy, digits, mlp
from torch import nn

from geomwatch import Measurement, Monitor, UsageError
from geomwatch.rules import NonFinite


def test_a_loss_that_the_host_knows_is_judged_in_the_same_call():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 12, batches=batches)
    batch = next(batches)
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    monitor.step(batch, loss=math.nan)
    told = [(a.rule, a.severity, a.step) for a in monitor.alerts]
    assert told == [("non_finite", "warning", 12)]  # its gradient is finite
    optimizer.step()
    monitor.close()
    assert len(monitor.alerts) == 1


@pytest.mark.parametrize("convert", [float, torch.tensor, lambda x: torch.tensor([x])])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_loss_and_norm_are_tensors_or_numbers(name, convert):
    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer) as monitor:
        for value in (1.0, 1.0, math.inf):
            optimizer.zero_grad()
            cross_entropy(model, digits(8)).backward()
            monitor.step(digits(8), **{name: convert(value)})
            optimizer.step()
    severity = "warning" if name == "loss" else "critical"
    assert [(a.rule, a.severity, a.step) for a in monitor.alerts] == [("non_finite", severity, 2)]


def test_a_loss_need_not_be_detached():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, rules=[])
    for batch in itertools.islice(draws(), 3):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss)
        optimizer.step()
    assert [r.step for r in monitor.history] == [0, 1, 2]


def test_gradients_that_are_still_scaled_are_recognised():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monitor = Monitor(model, cross_entropy, optimizer)
    batch = next(draws())
    scaler.scale(cross_entropy(model, batch)).backward()
    with pytest.raises(
        UsageError, match=r"got gradients 2\^16 times .* scaler.unscale_\(optimizer"
    ):
        monitor.step(batch)


def test_unscaled_gradients_are_taken():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monitor = Monitor(model, cross_entropy, optimizer)
    for batch in itertools.islice(draws(), 4):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch)).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        monitor.step(batch, grad_norm=norm)
        scaler.step(optimizer)
        scaler.update()
    assert [r.step for r in monitor.history] == [0, 1, 2, 3]
    assert not monitor.alerts


def test_gradients_that_nothing_unscales_are_measured_through_their_scale():
    records = {}
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        model = mlp(64, 16, 10)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        how = Measurement(quantities=["stability_margin", "lambda_max", "difficulty"])
        monitor = Monitor(model, cross_entropy, optimizer, how)
        for batch in itertools.islice(draws(), 6):
            optimizer.zero_grad()
            scaler.scale(cross_entropy(model, batch)).backward()
            before = model[0].weight.grad.clone()
            monitor.step(batch, grad_scale=scaler.get_scale())
            assert torch.equal(model[0].weight.grad, before)
            scaler.step(optimizer)
            scaler.update()
        records[scale] = monitor.history
    assert len(records[1.0]) == 5
    for plain, scaled in zip(*records.values(), strict=True):
        assert scaled.estimates == plain.estimates  # a power of two divides exactly
    assert plain["stability_margin"].value > 0
    assert plain["difficulty"].value > 0


def test_left_out_steps_are_information_and_five_are_critical():
    model, optimizer = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    infinite = {2, 3, 7, 8, 9, 10, 11, 12}
    heard = {}
    for call, batch in enumerate(itertools.islice(draws(), 16)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model, batch)).backward()
        if call in infinite:
            model[0].bias.grad[0] = math.inf
        scaler.unscale_(optimizer)
        monitor.step(batch)
        heard[call] = [(a.rule, a.severity) for a in monitor.alerts]
        scaler.step(optimizer)
        scaler.update()
    assert heard[3] == [("non_finite", "info")]  # the call after the first
    assert heard[11] == [("non_finite", "info")] * 2
    assert heard[15] == heard[12] == [("non_finite", "info")] * 2 + [("non_finite", "critical")]
    steps = [r.step for r in monitor.history]
    assert steps == list(range(16 - len(infinite)))  # no step is probed twice


def test_an_infinite_gradient_that_is_stepped_with_is_critical():
    model, optimizer = small()
    gone = torch.amp.GradScaler("cpu")
    gone.scale(torch.ones(()))
    gone.itself = gone  # of a run before, which nobody has collected yet
    del gone
    monitor = Monitor(model, cross_entropy, optimizer, rules=[NonFinite()], every=1)

    def spoil(step: int) -> None:
        if step == 9:
            model[0].bias.grad[0] = math.inf

    train(model, optimizer, monitor, 11, before=spoil, pass_loss=False)
    assert "a step with it destroys the weights" in monitor.alerts[0].message
    assert (monitor.alerts[0].step, monitor.alerts[0].severity) == (9, "critical")


def test_sparse_gradients_do_not_stop_a_run():
    model = nn.Sequential(nn.Embedding(17, 4, sparse=True), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = (((16 * x).long(), y) for x, y in draws())
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 10, batches=batches)
    monitor.close()
    assert [r.step for r in monitor.history] == DENSE
    assert monitor.history[-1]["stability_margin"].value > 0
