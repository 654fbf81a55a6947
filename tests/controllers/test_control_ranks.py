"""Two processes that train one model decide alike, and take the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from ranks import run
from torch.nn.parallel import DistributedDataParallel

import geomwatch
from geomwatch.controllers import BatchSizeScaler, GradientClipper, LearningRateCap
from geomwatch.controllers.actuators import Memory


def controlled(rank: int, cap: dict[str, float]) -> Any:
    """Train on uneven shards, at a rate that is far too large."""
    torch.manual_seed(0)
    model = DistributedDataParallel(mlp(64, 16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)
    controllers = [
        LearningRateCap(**cap),
        BatchSizeScaler(through=Memory("batch_scale"), limit=0.6, patience=0, cooldown=3),
        GradientClipper(rules=None),
    ]
    monitor = geomwatch.Monitor(
        model, cross_entropy, optimizer, controllers=controllers, budget=None if cap else 0.02
    )
    inputs, targets = digits(1024)
    for step in range(30):
        own = (
            slice(32 * step, 32 * step + 20) if rank == 0 else slice(32 * step + 20, 32 * step + 52)
        )
        batch = inputs[own], targets[own]
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()
    adjustments = [(a.step, a.knob, a.before, a.after, a.reason) for a in monitor.adjustments]
    scales = [controller.state_dict() for controller in controllers]
    return adjustments, scales, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("cap", "knobs"),
    [
        ({"c_bs": 2.0}, {"lr_scale", "batch_scale", "clip_norm"}),
        (
            {},
            {"lr_scale", "clip_norm"},
        ),  # what holds the first steps leaves the batch nothing to do
    ],
)
def test_ranks_decide_alike_to_the_last_bit(tmp_path, cap, knobs):
    first, second = run(controlled, tmp_path, cap)
    assert first[0] == second[0]
    assert first[1] == second[1]
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
    assert {knob for _, knob, *_ in first[0]} == knobs
