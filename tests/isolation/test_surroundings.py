"""What is switched on around a probe does not matter to it, nor it to what is around."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from problems import cross_entropy, mlp
from states import assert_same, everything
from torch import Tensor, nn
from undisturbed import NETS

import geomwatch


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad,
        torch.inference_mode,
        functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_surroundings_of_a_measurement_do_not_matter(surroundings):
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.Adam(model.parameters())
    plain = geomwatch.measure(model, cross_entropy, batch, optimizer=optimizer)
    with surroundings():
        before = everything(model, optimizer)
        record = geomwatch.measure(model, cross_entropy, batch, optimizer=optimizer)
        assert_same(before, everything(model, optimizer))
    assert record.estimates == plain.estimates
    assert record.provenance["dtype"] == "float32"


def test_batches_made_under_inference_mode_can_be_measured_on():
    model = mlp(5, 8, 3)
    with torch.inference_mode():
        batch = (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    plain = geomwatch.measure(model, cross_entropy, (batch[0].clone(), batch[1].clone()))
    assert geomwatch.measure(model, cross_entropy, batch).estimates == plain.estimates


def test_a_monitor_works_under_inference_mode():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.Adam(model.parameters())
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, batch).backward()
    with torch.inference_mode():
        record = monitor.step(batch)
    assert record["stability_margin"].value > 0


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch >= 2.9")
def test_tf32_settings_and_all_other_flags_of_a_backend_survive_a_probe_of_an_rnn():
    net = NETS["LSTM"]
    model, batch = net.make(), net.batch()
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # now reading the older allow_tf32 raises
    try:
        assert geomwatch.measure(model, cross_entropy, batch)["lambda_max"].value > 0
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_the_environment_can_turn_geomwatch_off(monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    seen: list[bool] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(geomwatch.is_probing())
        return cross_entropy(model, batch)

    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1)
    for _ in range(2):
        loss_fn(model, batch).backward()
        assert monitor.step(batch) is None
        optimizer.step()
    assert seen == [False, False]
    assert monitor.history == []
    monkeypatch.setenv("GEOMWATCH_DISABLE", "0")
    monitor = geomwatch.Monitor(model, loss_fn, optimizer)
    assert monitor.step(batch) is not None
    assert True in seen
