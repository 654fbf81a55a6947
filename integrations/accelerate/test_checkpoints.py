"""A monitor's state in accelerate's checkpoints: out, in, and where there is none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits
from torch import nn

import geomwatch
from geomwatch.integrations.accelerate import AcceleratedMonitor, watch

FIXED: dict[str, Any] = {"every": 2}


def micro_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = digits(16 * count)
    return list(zip(inputs.split(16), targets.split(16), strict=True))


def start(accelerator, **options) -> tuple[nn.Module, Any, AcceleratedMonitor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10)
    )
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    return model, optimizer, watch(accelerator, model, cross_entropy, optimizer, **options)


def go(accelerator, model, optimizer, monitor, batches) -> None:
    for batch in batches:
        with accelerator.accumulate(model):
            loss = cross_entropy(model, batch)
            accelerator.backward(loss)
            if monitor is not None:
                monitor.step(batch, loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()


def test_a_resumed_run_agrees_with_the_uninterrupted_one(make_accelerator, tmp_path):
    names = ["lambda_max", "stability_margin", "difficulty"]
    options = {**FIXED, "how": geomwatch.Measurement(quantities=names)}
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model, optimizer, monitor = start(accelerator, **options)
    batches = micro_batches(32)
    go(accelerator, model, optimizer, monitor, batches[:14])
    accelerator.save_state(str(tmp_path))
    go(accelerator, model, optimizer, monitor, batches[14:])

    other = make_accelerator(gradient_accumulation_steps=2)
    again, second, resumed = start(other, **options)
    other.load_state(str(tmp_path))
    go(other, again, second, resumed, batches[14:])

    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    late = [record for record in monitor.history if record.step >= 7]
    assert [record.step for record in resumed.history] == [r.step for r in late] == [8, 10, 12, 14]
    for record, expected in zip(resumed.history, late, strict=True):
        assert record.loss == expected.loss
        for name in ("lambda_max", "stability_margin"):
            error = record[name].error + expected[name].error
            assert record[name].value == pytest.approx(expected[name].value, abs=3 * error), name
    drift = late[-1]["difficulty"].value
    assert resumed.history[-1]["difficulty"].value == pytest.approx(drift, rel=0.1)


def test_the_state_holds_tensors_and_primitives_only(accelerator, tmp_path):
    model, optimizer, monitor = start(accelerator)
    go(accelerator, model, optimizer, monitor, micro_batches(8))
    accelerator.save_state(str(tmp_path))
    (state,) = torch.load(tmp_path / "geomwatch.pt", weights_only=True)
    assert state["step"] == 4
    assert not list(tmp_path.glob("custom_checkpoint_*"))


def test_a_checkpoint_of_a_run_without_geomwatch_can_be_gone_on_from(
    make_accelerator, tmp_path, caplog
):
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model, optimizer, monitor = start(accelerator)
    monitor.close()
    go(accelerator, model, optimizer, None, micro_batches(4))
    accelerator.save_state(str(tmp_path))

    other = make_accelerator(gradient_accumulation_steps=2)
    again, second, resumed = start(other, **FIXED)
    other.load_state(str(tmp_path))
    (told,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert "holds the state of 0 monitors, watched are 1" in told
    assert torch.equal(again[0].weight, model[0].weight)
    go(other, again, second, resumed, micro_batches(4))
    assert [record.step for record in resumed.history] == [0]


def test_a_run_without_geomwatch_can_go_on_from_a_checkpoint_with_it(make_accelerator, tmp_path):
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model, optimizer, monitor = start(accelerator)
    go(accelerator, model, optimizer, monitor, micro_batches(4))
    accelerator.save_state(str(tmp_path))

    other = make_accelerator(gradient_accumulation_steps=2)
    again, _, unused = start(other)
    unused.close()
    other.load_state(str(tmp_path))
    assert torch.equal(again[0].weight, model[0].weight)


def test_register_for_checkpointing_takes_a_monitor_too(make_accelerator, tmp_path):
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model, optimizer, monitor = start(accelerator, **FIXED)
    accelerator.register_for_checkpointing(monitor)
    go(accelerator, model, optimizer, monitor, micro_batches(12))
    accelerator.save_state(str(tmp_path))
    (tmp_path / "geomwatch.pt").unlink()

    other = make_accelerator(gradient_accumulation_steps=2)
    again, second, resumed = start(other, **FIXED)
    other.register_for_checkpointing(resumed)
    other.load_state(str(tmp_path))
    go(other, again, second, resumed, micro_batches(4))
    assert [record.step for record in resumed.history] == [6]


def test_several_monitors_get_their_own_state_back(make_accelerator, tmp_path):
    def two(accelerator) -> list[tuple[nn.Module, Any, AcceleratedMonitor]]:
        return [
            start(accelerator, **FIXED),
            start(accelerator, how=geomwatch.Measurement(seed=1), **FIXED),
        ]

    accelerator = make_accelerator()
    (model, optimizer, monitor), (other_model, other_optimizer, other) = two(accelerator)
    go(accelerator, model, optimizer, monitor, micro_batches(3))
    go(accelerator, other_model, other_optimizer, other, micro_batches(5))
    accelerator.save_state(str(tmp_path))

    resumed = make_accelerator()
    parts = two(resumed)
    resumed.load_state(str(tmp_path))
    for model, optimizer, monitor in parts:
        go(resumed, model, optimizer, monitor, micro_batches(2))
    assert [[r.step for r in monitor.history] for *_, monitor in parts] == [[4], [6]]


def test_state_of_other_rules_is_refused(make_accelerator, tmp_path):
    accelerator = make_accelerator()
    model, optimizer, monitor = start(accelerator)
    go(accelerator, model, optimizer, monitor, micro_batches(2))
    accelerator.save_state(str(tmp_path))
    other = make_accelerator()
    start_again = start(other, rules=[])
    with pytest.raises(geomwatch.UsageError, match=r"state must be of rules \[\], got"):
        other.load_state(str(tmp_path))
    start_again[2].close()


def test_the_first_window_after_a_checkpoint_within_one_may_be_shorter(make_accelerator, tmp_path):
    accelerator = make_accelerator(gradient_accumulation_steps=4)
    model, optimizer, monitor = start(accelerator)
    go(accelerator, model, optimizer, monitor, micro_batches(7))  # one window and three quarters
    accelerator.save_state(str(tmp_path))
    other = make_accelerator(gradient_accumulation_steps=4)
    again, second, resumed = start(other, **FIXED)
    other.load_state(str(Path(tmp_path)))
    go(other, again, second, resumed, micro_batches(5))
    assert [record.step for record in resumed.history] == [1, 2]
