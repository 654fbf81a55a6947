"""The rule on batches that are not like the others."""

from __future__ import annotations

import pytest
import torch
from observations import brief, heard
from torch import nn
from torch.nn import functional as F

from geomwatch import Monitor
from geomwatch.observation.findings import Findings, Present
from geomwatch.rules import BadBatch, Observation

OUTSIZED = Findings(outsized="batch[0]", times=100.0)


def run_of(losses, found=OUTSIZED):
    return [
        Observation(
            index=t, lr=(0.1,), present=Present(loss, None), inspect=lambda *, before=False: found
        )
        for t, loss in enumerate(losses)
    ]


def test_a_loss_far_above_the_last_ones_and_a_tensor_out_of_size_warn():
    (alert,) = heard(BadBatch(), run_of([1.0] * 30 + [900.0] + [1.0] * 9))
    assert (alert.step, alert.severity, alert.value) == (30, "warning", 100.0)
    assert alert.message.startswith("the batch of step 30 is not like the others. In the data, ba")
    assert "rate" not in alert.message


def test_a_loss_that_rises_while_the_data_is_as_usual_is_left_to_other_rules():
    assert not heard(BadBatch(), run_of([1.0] * 30 + [900.0], Findings()))
    usual = Findings(outsized="batch[0]", times=2.0)
    assert not heard(BadBatch(), run_of([1.0] * 30 + [900.0], usual))


def test_the_first_losses_are_spared():
    assert not heard(BadBatch(), run_of([1.0] * 9 + [900.0]))


def test_each_bad_batch_is_news():
    run = run_of(([1.0] * 60 + [900.0]) * 3)
    assert brief(heard(BadBatch(), run)) == [(t, "warning") for t in (60, 121, 182)]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("passes", [True, False])
def test_a_corrupt_batch_is_told_in_the_call_before_its_step(part, passes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    told, now = [], 0

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    monitor = Monitor(
        model, loss_fn, optimizer, on_alert=lambda alert: told.append((now, alert.message))
    )
    for now in range(80):
        x = torch.randn(32, 8)
        batch = [x, x.sum(1, keepdim=True)]
        if now == 75:
            batch[part] = 100 * batch[part]
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        before = len(told)
        monitor.step(tuple(batch), loss=loss.detach() if passes else None)
        if now < 75:
            assert len(told) == before
            optimizer.step()
        if now == 75:
            break
    (call, message), *_ = told
    assert call == 75
    assert f"In the data, batch[{part}] is" in message
