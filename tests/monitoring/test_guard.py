"""Everything after the first call of step() is guarded: what a loop holds or passes is survived."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp

from geomwatch import Measurement, Monitor, UsageError

NO_SCALARS: dict[str, Any] = {
    "two elements": torch.ones(2),
    "text": "low",
    "a list": [1.0],
    "a dict": {"loss": 1.0},
}


def train(
    *, steps: int = 5, of_group: dict[str, Any] | None = None, at: int = 0, **passed: Any
) -> Monitor:
    """SGD whose group holds something else, or which is told something else, from a step on."""
    model, batch = mlp(64, 4, 10), digits(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = Measurement(quantities=["lambda_max", "stability_margin"])
    with Monitor(model, cross_entropy, optimizer, how, every=2) as monitor:
        for step in range(steps):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            odd = step >= at
            held = dict(optimizer.param_groups[0])
            optimizer.param_groups[0] |= of_group if of_group and odd else {}
            monitor.step(batch, **({"loss": loss} | (passed if odd else {})))
            optimizer.param_groups[0] |= held
            optimizer.step()
    return monitor


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    "entries",
    [
        {"max_lr": [0.1, 0.2]},
        {"initial_lr": "fast"},
        {"max_lr": None},
        {"lr": math.nan},
        {"lr": -0.1},
        {"lr": "fast"},
    ],
    ids=str,
)
def test_whatever_a_group_holds_the_run_is_watched(entries, at, caplog):
    monitor = train(of_group=entries, at=at)
    assert [r.step for r in monitor.history] == [0, 2, 4]
    assert monitor.history[-1]["lambda_max"].value is not None
    margin = monitor.history[-1]["stability_margin"]
    if "lr" in entries:
        assert (margin.value, margin.status) == (None, "withheld")
        assert margin.reason.startswith("the learning rate is ")
    else:
        assert margin.value is not None
    assert "failed with" not in caplog.text


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", NO_SCALARS.values(), ids=NO_SCALARS)
def test_what_is_no_scalar_is_refused_at_first_and_left_out_later(value, name, caplog):
    with pytest.raises(UsageError, match="loss and grad_norm must be scalars"):
        train(**{name: value})
    monitor = train(at=1, **{name: value})
    assert [r.step for r in monitor.history] == [0, 2, 4]
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].endswith("What is none is left out.")


def test_closing_goes_on_whatever_fails(monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("a part is gone")

    monkeypatch.setattr("geomwatch.monitoring.watch.Watch.end", broken)
    lines: list[dict[str, Any]] = []
    model = mlp(64, 4, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Monitor(model, cross_entropy, optimizer, every=2, sinks=lines.append) as monitor:
        cross_entropy(model, digits(16)).backward()
        monitor.step(digits(16))
    assert "watching it failed with RuntimeError: a part is gone" in caplog.text
    assert not optimizer._optimizer_step_post_hooks
    assert lines[-1]["kind"] == "end"


def test_a_probe_whose_quantities_all_fail_is_a_failed_probe(monkeypatch, caplog):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no products today")

    monkeypatch.setattr("geomwatch.curvature.objective.Objective.hvp", broken)
    monitor = train(steps=9)
    assert [r.step for r in monitor.history] == [0, 2, 4]  # then it is paused
    assert "none of its quantities could be had: RuntimeError: no products today" in caplog.text
    assert "probing is paused after 3 failed probes in a row" in caplog.text


def test_a_gradient_whose_square_overflows_is_not_lost(caplog):
    def steep(model: Any, batch: Any) -> Any:
        return 1e30 * cross_entropy(model, batch)

    model, batch = mlp(64, 4, 10), digits(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-32)
    with Monitor(model, steep, optimizer, every=2) as monitor:
        for _ in range(4):
            optimizer.zero_grad()
            loss = steep(model, batch)
            loss.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            assert math.isinf(norm)
            monitor.step(batch, loss=loss)
            optimizer.step()
    assert not [a for a in monitor.alerts if a.rule == "non_finite"]


def test_an_infinite_norm_that_is_passed_is_held_against_the_weights():
    monitor = train(at=2, grad_norm=math.inf)
    found = [a for a in monitor.alerts if a.rule == "non_finite"]
    assert found
    assert not [a.message for a in found if "the weights are lost" in a.message]
