"""What a record of a real training holds, and when there is one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from loops import DENSE, draws, sgd, small, train
from problems import cross_entropy, digits, mlp
from torch import nn

from geomwatch import Measurement, Monitor


def test_step_returns_the_record_when_a_probe_was_due():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    returned = train(model, optimizer, monitor, 12)
    assert [t for t, record in enumerate(returned) if record is not None] == DENSE
    assert [record for record in returned if record is not None] == monitor.history
    assert [record.step for record in monitor.history] == DENSE


def test_a_records_step_counts_the_steps_the_optimizer_has_taken():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    batches = draws()
    for call in range(9):
        optimizer.zero_grad()
        batch = next(batches)
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        if call % 3:  # every third step is left out
            optimizer.step()
    assert [record.step for record in monitor.history] == [0, 1, 2, 3, 4, 5]


def test_a_record_holds_what_the_step_was_trained_on():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    batch = next(draws())
    loss = cross_entropy(model, batch)
    loss.backward()
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    record = monitor.step(batch)
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record["loss"].value == record.loss
    assert record["grad_norm"].value == pytest.approx(norm.item(), rel=1e-5)
    assert record.lr == (0.05,)
    assert record.provenance["mode"] == "train"
    assert record.provenance["items"] == 64


def test_the_margin_is_rate_times_curvature_over_the_limit_of_the_optimizer():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 10)
    for record in monitor.history:
        margin, top = record["stability_margin"], record["lambda_max"]
        assert margin.value == pytest.approx(0.05 * top.value / (2 * (1 + 0.9)), rel=1e-5)


def test_scalars_are_flat_and_finite_under_the_prefix():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 4)
    record = monitor.history[-1]
    flat = record.scalars()
    assert all(type(v) is float and math.isfinite(v) for v in flat.values())
    held = {n for n in record if record[n].status == "held"}
    assert "batch_sharpness" in held  # a tracker would take them for measured now
    fresh = [n for n in record if n not in held]
    expected = {f"geom/{n}" for n in fresh if record[n].value is not None}
    expected |= {f"geom/{n}_error" for n in fresh if record[n].error is not None}
    assert set(flat) == expected | {"geom/probe_seconds"}
    assert {"geom/loss", "geom/lambda_max", "geom/lambda_max_error"} <= set(flat)
    assert "curvature.loss" in record.scalars("curvature.")
    assert len(record.scalars("")) == len(flat)


def test_held_values_carry_their_age():
    model = mlp(64, 16, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor = Monitor(model, cross_entropy, optimizer, every=2)
    train(model, optimizer, monitor, 12)
    measured: dict[str, tuple[int, float]] = {}
    ages = []
    for record in monitor.history:
        for name, estimate in record.estimates.items():
            if estimate.status == "held":
                step, value = measured[name]
                assert (estimate.age, estimate.value, estimate.hvps) == (
                    record.step - step,
                    value,
                    0,
                )
                ages.append(estimate.age)
            elif estimate.value is not None:
                assert estimate.age == 0
                measured[name] = (record.step, estimate.value)
    assert max(ages) >= 5  # Adam's margin needs its own operator, so lambda_max is left to rest


def test_named_quantities_are_measured_at_every_probe():
    model, optimizer = small()
    names = ["lambda_min", "loss"]
    monitor = Monitor(model, cross_entropy, optimizer, how=Measurement(quantities=names), every=3)
    train(model, optimizer, monitor, 30)
    assert len(monitor.history) == 10
    for record in monitor.history:
        assert list(record) == names
        assert {record[name].status for name in names} == {"ok"}


def test_difficulty_grows_by_rate_times_gradient_squared_times_curvature():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    train(model, optimizer, monitor, 6)
    so_far = 0.0
    for record in monitor.history:
        assert record["difficulty"].value == pytest.approx(so_far, rel=1e-4)
        so_far += 0.05 * record["grad_norm"].value ** 2 * record["lambda_max"].value
    assert so_far > 0


def test_a_window_of_micro_batches_measures_like_their_union():
    # Few enough parameters for Lanczos to be exact.
    inputs, targets = digits(64)
    parts = list(zip(inputs.split([16, 8, 40]), targets.split([16, 8, 40]), strict=True))
    records = {}
    for way in ("window", "union"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(4), nn.Flatten())
        model.append(nn.Linear(4, 10, bias=False)).append(nn.AvgPool1d(5))
        optimizer = sgd(model)
        monitor = Monitor(model, lambda m, b: cross_entropy(m, (b[0], b[1] % 2)), optimizer)
        for part in parts:
            (len(part[0]) / 64 * cross_entropy(model, (part[0], part[1] % 2))).backward()
            if way == "window":
                monitor.observe(part)
        records[way] = monitor.step(None if way == "window" else (inputs, targets))
    for name in ("loss", "grad_norm", "lambda_max", "stability_margin", "batch_sharpness"):
        window, union = records["window"][name], records["union"][name]
        spread = (window.error or 0.0) + (union.error or 0.0) + 5e-3 * abs(union.value)
        assert window.value == pytest.approx(union.value, abs=spread), name
    assert records["window"].provenance["items"] == 64


def test_a_window_ends_with_its_step():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    first, second = itertools.islice(draws(size=16), 2)
    for batch in (first, second):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.observe(batch)
        record = monitor.step()
        assert record.provenance["items"] == 16
        optimizer.step()


def test_a_probe_batch_is_measured_instead_of_the_steps_own():
    model, optimizer = small()
    probe_batch = digits(100)
    monitor = Monitor(model, cross_entropy, optimizer, how=Measurement(batch=probe_batch))
    for batch in itertools.islice(draws(), 4):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        expected = cross_entropy(model, probe_batch).item()
        record = monitor.step()
        assert record.loss == pytest.approx(expected, rel=1e-6)
        assert record.provenance["items"] == 100
        optimizer.step()
