"""What controllers turn in a loop on accelerate: rates within steps, accumulation, samplers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from problems import cross_entropy, digits, mlp
from scripted import Scripted
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from geomwatch.controllers import LearningRateCap, ResizableBatchSampler
from geomwatch.controllers.resizable import SampledBatches
from geomwatch.integrations.accelerate import watch


def run(
    accelerator: Any,
    *,
    lr: float = 0.1,
    steps: int = 56,
    batch: int = 16,
    sampler: Any = None,
    **options,
):
    """Train on digits; return the monitor, rates and items of each step, and the losses."""
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    data = TensorDataset(*digits(1797))
    loader = DataLoader(data, batch_size=batch) if sampler is None else None
    loader = loader or DataLoader(data, batch_sampler=sampler(data))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    monitor = watch(accelerator, model, cross_entropy, optimizer, **options)
    taken, items, losses, window = [], [], [], 0
    optimizer.optimizer.register_step_pre_hook(lambda o, *_: taken.append(o.param_groups[0]["lr"]))
    for _, batch in zip(range(steps), loader, strict=False):
        with accelerator.accumulate(model):
            loss = cross_entropy(model, batch)
            accelerator.backward(loss)
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        window += len(batch[0])
        if accelerator.sync_gradients:
            items.append(window)
            window = 0
    monitor.close()
    return monitor, taken, items, losses


def test_a_rate_far_too_large_trains_and_the_schedule_keeps_its_own(make_accelerator):
    *_, lost = run(make_accelerator(), lr=2.0, batch=32)
    options = {"batch": 32, "controllers": [LearningRateCap()]}
    monitor, taken, _, losses = run(make_accelerator(), lr=2.0, **options)
    assert sum(losses[-10:]) < 0.8 * sum(lost[-10:])
    assert max(taken) < 1.8
    assert monitor.history[-1].lr[0] == pytest.approx(2 * 0.99 ** monitor.history[-1].step)


def test_accumulation_widens_where_both_windows_end(make_accelerator):
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    controllers = [Scripted("batch_scale", {0: 2.0, 4: 1.0})]
    monitor, _, items, _ = run(accelerator, steps=24, controllers=controllers)
    # wanted before the first step; windows of four begin where one would have begun anyway
    assert items == [32, 32, 64, 64, 64, 32, 32, 32, 32]
    assert [a.after for a in monitor.adjustments] == [2.0, 1.0]
    assert accelerator.gradient_accumulation_steps == 2


def test_a_loop_that_does_not_accumulate_gets_advice(make_accelerator):
    accelerator = make_accelerator()
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    scripted = Scripted("batch_scale", {0: 2.0, 1: 2.0})
    monitor = watch(accelerator, model, cross_entropy, optimizer, controllers=[scripted])
    for _ in range(2):
        accelerator.backward(cross_entropy(model, digits(32)))
        monitor.step(digits(32))
        optimizer.step()
        optimizer.zero_grad()
    (advice,) = monitor.adjustments
    assert "put its body into accelerator.accumulate(model)" in advice.reason
    assert accelerator.gradient_accumulation_steps == 1


def test_a_resizable_sampler_is_found_in_the_loader_that_prepare_returned(make_accelerator):
    controllers = [Scripted("batch_scale", {1: 2.0})]
    _, _, items, _ = run(
        make_accelerator(),
        steps=5,
        sampler=lambda data: ResizableBatchSampler(SequentialSampler(data), 16),
        controllers=controllers,
    )
    assert items == [16, 16, 16, 32, 32]  # accelerate draws one batch ahead


def test_the_shards_of_two_processes_grow_together():
    data = range(96)
    shards, knobs = [], []
    for rank in range(2):
        sampler = ResizableBatchSampler(SequentialSampler(data), 8)
        shards.append(BatchSamplerShard(sampler, num_processes=2, process_index=rank))
        knobs.append(SampledBatches(shards[-1]))
    drawn: list[list[int]] = []
    for n, batches in enumerate(zip(*shards, strict=True)):
        assert len({len(batch) for batch in batches}) == 1
        drawn += batches
        if n == 1:
            for knob in knobs:
                knob.set(2.0)
    assert [len(batch) for batch in drawn] == [8, 8, 8, 8, 16, 16, 16, 16]
    assert sorted(itertools.chain.from_iterable(drawn)) == list(data)


def test_a_step_is_clipped_after_what_the_loop_clips_at(make_accelerator):
    _, _, _, plain = run(make_accelerator(), steps=8)
    scripted = Scripted("clip_norm", {0: 1e-6, 4: math.inf})
    _, _, _, clipped = run(make_accelerator(), steps=8, controllers=[scripted])
    assert clipped[0] == plain[0]
    assert max(clipped[:4]) > 2.2  # no step to speak of
    assert clipped[-1] != plain[-1]
