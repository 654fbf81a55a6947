"""Whole trainings: healthy ones in silence, and a warning before the others break."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from loops import Batch, HandMade, draws, loud, sgd, train
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch import Measurement, Monitor


def convnet(*, norm: bool) -> nn.Module:
    def block(fan_in: int, fan_out: int, stride: int) -> list[nn.Module]:
        layer = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=not norm)
        return [layer, *([nn.BatchNorm2d(fan_out)] if norm else []), nn.ReLU()]

    blocks = [*block(1, 16, 1), *block(16, 32, 2), *block(32, 32, 1)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *blocks, nn.Flatten(), nn.Linear(512, 10))


def test_the_scale_of_weights_before_a_batchnorm_does_not_move_the_margin():
    records = []
    for scale in (1.0, 0.3):
        torch.manual_seed(0)
        model = convnet(norm=True)
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Conv2d):
                    layer.weight *= scale
        optimizer = sgd(model)
        how = Measurement(quantities=["stability_margin", "lambda_max"])
        monitor = Monitor(model, cross_entropy, optimizer, how)
        train(model, optimizer, monitor, 1)
        records.append(monitor.history[0])
    one, other = records
    assert other["lambda_max"].value > 3 * one["lambda_max"].value
    assert other["stability_margin"].value == pytest.approx(one["stability_margin"].value, rel=0.05)


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=3e-3)


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (lambda: mlp(64, 128, 64, 10), sgd),
        (lambda: mlp(64, 128, 64, 10), adam),
        (lambda: convnet(norm=False), lambda m: sgd(m, lr=0.02)),
        (lambda: convnet(norm=True), sgd),
        (lambda: convnet(norm=True), lambda m: torch.optim.AdamW(m.parameters(), lr=3e-3)),
        (lambda: mlp(64, 128, 64, 10), lambda m: HandMade(m, lr=0.1)),
    ],
    ids=["mlp sgd", "mlp adam", "conv sgd", "batchnorm sgd", "batchnorm adamw", "mlp hand-made"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_healthy_run_raises_no_warning(build, make, seed):
    torch.manual_seed(seed)
    model = build()
    optimizer = make(model)
    with Monitor(model, cross_entropy, optimizer) as monitor:
        train(model, optimizer, monitor, 150, batches=draws(seed))
    inputs, targets = digits(1797)
    assert F.cross_entropy(model(inputs), targets) < 0.8  # it has learnt something
    assert not loud(monitor.alerts)


def test_full_batch_training_at_the_edge_of_stability_raises_no_warning():
    torch.manual_seed(0)
    model, batch = mlp(64, 32, 10, activation=nn.Tanh), digits(400)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)

    def half_square(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean() / 2

    with Monitor(model, half_square, optimizer) as monitor:
        train(model, optimizer, monitor, 300, batches=itertools.repeat(batch), loss_fn=half_square)
    assert not loud(monitor.alerts)
    assert [a.severity for a in monitor.alerts] == ["info"]
    assert max(r["stability_margin"].value for r in monitor.history if r.step > 100) > 1


@pytest.mark.parametrize(
    ("build", "start"), [(lambda: mlp(64, 128, 64, 10), 0.02), (lambda: convnet(norm=False), 0.01)]
)
def test_a_rate_that_is_ramped_until_it_breaks_is_warned_of_before(build, start):
    torch.manual_seed(0)
    model = build()
    optimizer = sgd(model, start)
    losses: list[float] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model, batch)
        if not geomwatch.is_probing():
            losses.append(loss.item())
        return loss

    def ramp(step: int) -> None:
        optimizer.param_groups[0]["lr"] = start * 1.02**step

    monitor = Monitor(model, loss_fn, optimizer)
    train(model, optimizer, monitor, 230, before=ramp, loss_fn=loss_fn)
    blow_up = next(t for t, x in enumerate(losses) if t > 10 and not x <= losses[0] + 0.5)
    assert loud(monitor.alerts)[0].step < blow_up
