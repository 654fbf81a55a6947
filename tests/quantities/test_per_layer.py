"""Curvature by module, through `measure` and a monitor."""

from __future__ import annotations

import pytest
import torch
from problems import cross_entropy, dense_hessian, digits, mlp

import geomwatch


def test_each_module_has_the_top_eigenvalue_and_trace_of_its_own_block():
    torch.manual_seed(0)
    model, batch = mlp(64, 8, 10), digits(128)
    record = geomwatch.measure(
        model, cross_entropy, batch, how=geomwatch.Measurement(per_layer=True), samples=200
    )
    hessian, start = dense_hessian(model, batch), 0
    for name in ("0", "2"):
        size = sum(p.numel() for p in model[int(name)].parameters())
        block = hessian[start : start + size, start : start + size]
        start += size
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert record[f"lambda_max/{name}"].value == pytest.approx(top, rel=0.01)
        trace = record[f"trace/{name}"]
        assert abs(trace.value - float(block.trace())) < 4 * trace.error
    total = record["trace/0"].value + record["trace/2"].value
    assert total == pytest.approx(record["trace"].value, rel=1e-4)


def test_a_monitor_measures_layers_at_every_tenth_probe_and_holds_them():
    model, batch = mlp(64, 8, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, how=geomwatch.Measurement(per_layer=True), every=1
    )
    for _ in range(12):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
    ages = [record["lambda_max/0"].age for record in monitor.history]
    assert ages == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    keys = set(monitor.history[10].scalars())
    assert "geom/trace.2" in keys
    # where a tracker keeps a metric as a file, no key may be the folder of another
    assert not any(key.startswith(f"{other}/") for key in keys for other in keys)
