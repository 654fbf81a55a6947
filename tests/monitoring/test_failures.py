"""Whatever a probe raises, training goes on, and is watched again when it can be."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from loops import Batch, draws, loud, small, train, weights
from problems import cross_entropy
from torch import Tensor, nn

import geomwatch
from geomwatch import Monitor


class Failing:
    """A loss that works in training and raises in probes while `broken`."""

    def __init__(self) -> None:
        self.broken = True

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.broken and geomwatch.is_probing():
            raise RuntimeError("no second helping")
        return cross_entropy(model, batch)


def test_a_failing_probe_is_reported_once_and_training_goes_on(caplog):
    loss_fn = Failing()
    model, optimizer = small()
    monitor = Monitor(model, loss_fn, optimizer)
    train(model, optimizer, monitor, 30, loss_fn=loss_fn)
    bare, bare_optimizer = small()
    train(bare, bare_optimizer, None, 30)
    assert torch.equal(weights(model), weights(bare))
    failed, paused = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "step 0: a probe failed with RuntimeError: no second helping" in failed.getMessage()
    assert "step 2: probing is paused after 3 failed probes" in paused.getMessage()
    assert not monitor.history


def test_probes_go_on_after_resume_or_when_failures_are_few():
    loss_fn = Failing()
    model, optimizer = small()
    monitor = Monitor(model, loss_fn, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 2, batches=batches, loss_fn=loss_fn)
    loss_fn.broken = False
    train(model, optimizer, monitor, 2, batches=batches, loss_fn=loss_fn)
    assert [r.step for r in monitor.history] == [2, 3]
    loss_fn.broken = True
    train(model, optimizer, monitor, 30, batches=batches, loss_fn=loss_fn)
    assert [r.step for r in monitor.history] == [2, 3]
    loss_fn.broken = False
    train(model, optimizer, monitor, 3, batches=batches, loss_fn=loss_fn)
    assert [r.step for r in monitor.history] == [2, 3]  # still paused
    monitor.resume()
    train(model, optimizer, monitor, 30, batches=batches, loss_fn=loss_fn)
    assert len(monitor.history) > 2
    assert monitor.history[2].step >= 37


@pytest.mark.parametrize("error", [MemoryError("full"), KeyError("label"), AssertionError("oops")])
def test_whatever_a_loss_raises_in_a_probe_training_goes_on(error, caplog):
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if geomwatch.is_probing():
            raise error
        return cross_entropy(model, batch)

    model, optimizer = small()
    train(model, optimizer, Monitor(model, loss_fn, optimizer), 3, loss_fn=loss_fn)
    assert f"{type(error).__name__}: {error}" in caplog.text


def test_a_run_outlives_nan_and_is_measured_again_once_it_is_mended():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    kept: dict[str, Any] = {}

    def break_and_mend(step: int) -> None:
        if step == 6:
            kept.update(copy.deepcopy({"model": model.state_dict(), "sgd": optimizer.state_dict()}))

    batches = draws()
    train(model, optimizer, monitor, 7, batches=batches, before=break_and_mend)
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    train(model, optimizer, monitor, 3, batches=batches)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["sgd"])
    train(model, optimizer, monitor, 5, batches=batches)
    monitor.close()
    assert [(a.rule, a.severity, a.step) for a in loud(monitor.alerts)] == [
        ("non_finite", "critical", 7)
    ]
    assert [r.step for r in monitor.history] == list(range(15))
    for record in monitor.history[7:10]:
        assert math.isnan(record.loss)
        assert record["lambda_max"].status == "failed"
        assert "not finite" in record["lambda_max"].reason
        assert not any(math.isnan(v) for v in record.scalars().values())
    for record in monitor.history[:7] + monitor.history[10:]:
        assert record["lambda_max"].value > 0
        assert record["stability_margin"].status == "ok"
