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
            optimizer=optimizer,
            quantities=["gradient_noise_scale", "temperature"],
            seed=seed,
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
        model, cross_entropy, (x[:12], y[:12]), quantities=["gradient_noise_scale"]
    )
    assert record["gradient_noise_scale"].value is None
    assert "two or more micro-batches" in record["gradient_noise_scale"].reason


def test_a_window_of_micro_batches_is_its_own_pieces():
    model, optimizer, (x, y) = trained()
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, quantities=["gradient_noise_scale", "grad_norm"]
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
