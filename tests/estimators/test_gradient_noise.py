"""Gradient noise of a real net through `measure`, against the gradient of each item."""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch

LR, MOMENTUM = 0.05, 0.9


def trained() -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(512)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    return model, optimizer, batch


def per_item(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), y[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, *batch)
    return torch.cat([g.flatten(1) for g in found.values()], 1)


def test_noise_scale_and_temperature_are_those_of_the_items():
    model, optimizer, batch = trained()
    gradients = per_item(model, batch)
    n, dim = gradients.shape
    sigma = float((gradients - gradients.mean(0)).square().sum() / (n - 1))
    signal = float(gradients.mean(0).square().sum()) - sigma / n
    scales, temperatures = [], []
    for seed in range(20):
        record = geomwatch.measure(
            model,
            cross_entropy,
            batch,
            how=geomwatch.Measurement(
                quantities=["gradient_noise_scale", "temperature"], seed=seed
            ),
            optimizer=optimizer,
        )
        scales.append(record["gradient_noise_scale"])
        temperatures.append(record["temperature"])
    spread = statistics.stdev(e.value for e in temperatures)
    expected = LR * sigma / n / (2 * dim * (1 - MOMENTUM))
    mean = statistics.fmean(e.value for e in temperatures)
    assert abs(mean - expected) < 4 * spread / 20**0.5
    assert statistics.fmean(e.error for e in temperatures) == pytest.approx(spread, rel=0.6)
    inside = sum(abs(e.value - sigma / signal) < 2.4 * e.error for e in scales)
    assert inside >= 16


def test_too_few_items_have_no_noise_scale():
    model, _optimizer, (x, y) = trained()
    record = geomwatch.measure(
        model,
        cross_entropy,
        (x[:3], y[:3]),
        how=geomwatch.Measurement(quantities=["gradient_noise_scale"]),
    )
    assert record["gradient_noise_scale"].value is None
    assert record["gradient_noise_scale"].status == "withheld"
    assert "3 items can't be cut into 4 micro-batches" in record["gradient_noise_scale"].reason


def test_a_window_of_micro_batches_is_its_own_pieces():
    model, optimizer, (x, y) = trained()
    monitor = geomwatch.Monitor(
        model,
        cross_entropy,
        optimizer,
        how=geomwatch.Measurement(quantities=["gradient_noise_scale", "grad_norm"]),
    )
    optimizer.zero_grad()
    for start in range(0, 256, 64):
        batch = (x[start : start + 64], y[start : start + 64])
        (cross_entropy(model, batch) / 4).backward()
        monitor.observe(batch)
    record = monitor.step()
    pieces = torch.stack(
        [per_item(model, (x[i : i + 64], y[i : i + 64])).mean(0) for i in range(0, 256, 64)]
    )
    noise = 64 * float((pieces - pieces.mean(0)).square().sum()) / 3
    signal = float(pieces.mean(0).square().sum()) - noise / 256
    assert record["gradient_noise_scale"].value == pytest.approx(noise / signal, rel=1e-3)


class Scaled(nn.Module):
    """Items of curvature h_i: L = mean(h) w'Aw / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))

    def forward(self, h: Tensor) -> Tensor:
        return h.mean() * 0.5 * (torch.tensor([4.0, 2.0, 1.0]).double() * self.w**2).sum()


def curvatures(model: nn.Module, h: Tensor) -> Tensor:
    return model(h)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_stochastic_margin_is_that_of_curvature_differing_between_batches(momentum):
    """M_ms = lr [lambda / (2(1+mu)) + V / (2 lambda (1-mu))], V of a batch's top curvature."""
    torch.manual_seed(0)
    h = torch.rand(64, dtype=torch.float64) + 0.5
    model, lr = Scaled(), 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    lam = 4 * float(h.mean())
    variance = 16 * float(h.var()) / 64
    expected = lr * (lam / (2 * (1 + momentum)) + variance / (2 * lam * (1 - momentum)))
    found = []
    for seed in range(40):  # the micro-batches are random
        record = geomwatch.measure(
            model,
            curvatures,
            h,
            how=geomwatch.Measurement(
                quantities=["stability_margin", "stochastic_margin"], seed=seed
            ),
            optimizer=optimizer,
        )
        margin = record["stochastic_margin"]
        assert margin.value >= record["stability_margin"].value
        assert margin.error > 0
        found.append(margin.value)
    spread = statistics.stdev(found) / len(found) ** 0.5
    assert abs(statistics.fmean(found) - expected) < 4 * spread + 1e-9
    deterministic = lr * lam / (2 * (1 + momentum))
    assert statistics.fmean(found) - deterministic > 0.8 * (expected - deterministic)


def test_the_micro_batches_of_a_window_are_those_of_the_stochastic_margin():
    model, lr = Scaled(), 0.1
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    window = [torch.full((8,), h, dtype=torch.float64) for h in (0.5, 1.0, 1.8)]
    monitor = geomwatch.Monitor(
        model,
        curvatures,
        optimizer,
        how=geomwatch.Measurement(quantities=["stability_margin", "stochastic_margin"]),
        every=1,
    )
    for h in window:
        (model(h) / 3).backward()
        monitor.observe(h)
    record = monitor.step()
    lam = 4 * 1.1
    variance = 16 * statistics.variance((0.5, 1.0, 1.8)) / 3
    expected = lr * (lam / 2 + variance / (2 * lam))
    assert record["stochastic_margin"].value == pytest.approx(expected, rel=1e-6)


def test_pieces_of_a_batch_norm_have_no_spread_but_micro_batches_do():
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    names = ["stochastic_margin", "gradient_noise_scale"]
    x, y = digits(128)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=geomwatch.Measurement(quantities=names), every=1
    )
    cross_entropy(model, (x, y)).backward()
    whole = monitor.step((x, y))
    for part in range(4):
        monitor.observe((x[32 * part : 32 * part + 32], y[32 * part : 32 * part + 32]))
    optimizer.step()
    optimizer.zero_grad()
    cross_entropy(model, (x, y)).backward()
    cut = monitor.step()
    for name in names:
        assert whole[name].status == "withheld"
        assert "statistics of their own" in whole[name].reason
        assert cut[name].value > 0
