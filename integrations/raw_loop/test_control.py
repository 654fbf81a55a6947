"""Controllers in plain loops: batches through a sampler and through accumulation."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from problems import cross_entropy, digits, mlp
from scripted import Scripted
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from geomwatch import Monitor
from geomwatch.controllers import (
    Accumulation,
    BatchSizeScaler,
    GradientClipper,
    LearningRateCap,
    ResizableBatchSampler,
)
from geomwatch.controllers.resizable import SampledBatches

DATA = TensorDataset(*digits(1024))


class Through(Scripted):
    """A scripted controller of the batch that brings what it turns."""

    def __init__(self, moves: dict[int, float], through: Any) -> None:
        super().__init__("batch_scale", moves)
        self.through = through


def build(lr: float = 0.1):
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_a_loader_draws_the_batches_that_a_controller_wants():
    model, optimizer = build()
    sampler = ResizableBatchSampler(RandomSampler(DATA), 32)
    loader = DataLoader(DATA, batch_sampler=sampler)
    controllers = [Through({1: 2.0, 3: 1.0}, SampledBatches(sampler))]
    monitor = Monitor(model, cross_entropy, optimizer, controllers=controllers, every=1)
    sizes = []
    for batch in itertools.islice(loader, 6):
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
        optimizer.zero_grad()
        sizes.append(len(batch[0]))
    assert sizes == [32, 32, 64, 64, 32, 32]
    assert [r.knobs["batch_scale"] for r in monitor.history] == [1, 2, 2, 1, 1, 1]


def test_windows_of_accumulation_widen_and_are_measured_whole():
    model, optimizer = build()
    accumulation = Accumulation(2)
    controllers = [Through({1: 2.0}, accumulation)]
    monitor = Monitor(model, cross_entropy, optimizer, controllers=controllers, every=1)
    loader = DataLoader(DATA, batch_size=16)
    for window in itertools.islice(accumulation.windows(loader), 4):
        for batch in window:
            (cross_entropy(model, batch) / len(window)).backward()
            monitor.observe(batch)
        monitor.step()
        optimizer.step()
        optimizer.zero_grad()
    assert [r.provenance["items"] for r in monitor.history] == [32, 32, 64, 64]


def test_three_controllers_share_a_run_that_would_have_been_lost():
    model, optimizer = build(lr=1.0)
    sampler = ResizableBatchSampler(RandomSampler(DATA), 16)
    controllers = [
        GradientClipper(rules=None, policy="zscore"),
        BatchSizeScaler(through=sampler, max_batch=64),
        LearningRateCap(),
    ]
    monitor = Monitor(model, cross_entropy, optimizer, controllers=controllers)
    loader = DataLoader(DATA, batch_sampler=sampler)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for batch in itertools.islice(batches, 120):
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    assert cross_entropy(model, digits(1024)).item() < 1
    turned = [(a.step, a.knob) for a in monitor.adjustments if a.effect == "applied"]
    assert len(turned) == len(set(turned))  # no knob twice in a step
    assert {"lr_scale", "clip_norm"} <= {knob for _, knob in turned}
