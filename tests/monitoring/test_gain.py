"""The margin is that of the step that will be taken: clipped, accumulated or scaled as it is."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from problems import cross_entropy, dense_hessian, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch import Measurement, Monitor


def loss_of(model: Any, batch: Any) -> Tensor:
    return cross_entropy(model, batch)


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 10)]
    return nn.Sequential(*layers)


def exact_margin(model: nn.Module, batch: Any, lr: float) -> float:
    top = torch.linalg.eigvalsh(dense_hessian(model, batch))[-1]
    return lr * float(top) / 2


def watched(model: nn.Module, kind: Any = torch.optim.SGD, lr: float = 0.1, **more: Any) -> Any:
    optimizer = kind(model.parameters(), lr=lr)
    how = Measurement(quantities=["stability_margin", "lambda_max"])
    return optimizer, Monitor(model, loss_of, optimizer, how, **more)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("clip", [0.01, 0.1])
def test_a_clipped_step_has_the_margin_of_its_length(clip: float, tells: bool) -> None:
    model, batch = net(), digits(64)
    _, monitor = watched(model, every=1)
    loss_of(model, batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    record = monitor.step(batch, grad_norm=norm if tells else None)
    gain = clip / float(norm)
    assert record.provenance["gain"] == pytest.approx(gain, rel=1e-3)
    margin = record["stability_margin"]
    expected = gain * exact_margin(model, batch, 0.1)
    assert abs(margin.value - expected) <= margin.error + 0.01 * expected
    assert record["lambda_max"].value == pytest.approx(2 * margin.value / (0.1 * gain), rel=1e-3)


def test_a_clip_that_does_not_bind_changes_nothing() -> None:
    margins = []
    for clip in (math.inf, 1e3):
        model, batch = net(), digits(64)
        _, monitor = watched(model, every=1)
        loss_of(model, batch).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        margins.append(monitor.step(batch, grad_norm=norm)["stability_margin"].value)
    assert margins[0] == margins[1]


@pytest.mark.parametrize("factor", [8.0, 0.25, 3.0])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_scaled_loss_is_the_margin_of_the_scaled_loss(kind: Any, factor: float) -> None:
    """For Adam it is none: its step does not know the scale."""
    margins = []
    for scale in (1.0, factor):
        model, batch = net(), digits(64)
        optimizer, monitor = watched(model, kind, every=1)
        for _ in range(3):
            optimizer.zero_grad()
            (scale * loss_of(model, batch)).backward()
            record = monitor.step(batch)
            if kind is torch.optim.SGD:
                break  # steps of other lengths lead elsewhere
            optimizer.step()
        margins.append(record["stability_margin"].value)
    expected = factor if kind is torch.optim.SGD else 1.0
    assert margins[1] == pytest.approx(expected * margins[0], rel=0.02)


def test_an_accumulation_that_is_not_divided_is_told_of_at_the_first_probe(caplog: Any) -> None:
    caplog.set_level(logging.WARNING, "geomwatch")
    model, (inputs, targets) = net(), digits(64)
    _, monitor = watched(model, every=1)
    for part in zip(inputs.split(8), targets.split(8), strict=True):
        loss_of(model, part).backward()
        monitor.observe(part)
    record = monitor.step()
    expected = 8 * exact_margin(model, (inputs, targets), 0.1)
    margin = record["stability_margin"]
    assert abs(margin.value - expected) <= margin.error + 0.02 * expected
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("the step's gradient is 8 x that of loss_fn on the same batches")


@pytest.mark.parametrize("dropout", [0.3, 0.6])
def test_another_dropout_mask_is_no_gain_and_clipping_is_known_from_norms(dropout: float) -> None:
    model, batch = net(dropout), digits(64)
    _, monitor = watched(model, every=1)
    loss_of(model, batch).backward()
    assert monitor.step(batch).provenance["gain"] == 1.0
    _, monitor = watched(model, every=1)
    model.zero_grad()
    loss_of(model, batch).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    record = monitor.step(batch, grad_norm=norm)
    assert record.provenance["gain"] == pytest.approx(0.01 / float(norm), rel=1e-4)


@pytest.mark.parametrize("tells", [True, False])
def test_sentinels_see_the_clipped_step_too(tells: bool, clock_that_runs: None) -> None:
    found = {}
    for clip in (math.inf, 0.05):
        model, batch = net(), digits(64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        seen: list[geomwatch.rules.Observation] = []

        class Listening:
            name = "listening"

            def __call__(self, step: Any, seen: Any = seen) -> None:
                if step.gradient_fresh and not step.fresh:
                    seen.append(step)

        monitor = Monitor(model, loss_of, optimizer, rules=[Listening()])
        norms = []
        for _ in range(4):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            norms.append(float(norm))
            monitor.step(batch, grad_norm=norm if tells else None)
            optimizer.step()
        assert len(monitor.history) == 1
        gains = [min(1.0, clip / n) for n in norms[1:]]
        found[clip] = [s.gradient_margin.value / g for s, g in zip(seen, gains, strict=True)]
    for free, clipped in zip(*found.values(), strict=True):
        assert clipped == pytest.approx(free, rel=0.15)  # the weights move less


def test_a_healthy_clipped_run_is_quiet_and_an_unclipped_one_is_warned_of() -> None:
    def alerts(clip: float) -> list[str]:
        torch.manual_seed(0)
        model = mlp(64, 32, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
        monitor = Monitor(model, loss_of, optimizer)
        inputs, targets = digits(1024)
        for step in range(60):
            rows = slice(32 * (step % 32), 32 * (step % 32 + 1))
            batch = inputs[rows], targets[rows]
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            monitor.step(batch, loss=loss.detach(), grad_norm=norm)
            optimizer.step()
        return [a.rule for a in monitor.alerts if a.severity != "info"]

    assert alerts(0.02) == []
    assert alerts(math.inf)
