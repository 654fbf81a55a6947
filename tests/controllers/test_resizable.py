"""Batches that change their size while loaders, shards and windows draw them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from geomwatch.controllers import Accumulation, ResizableBatchSampler
from geomwatch.controllers.resizable import SampledBatches
from geomwatch.errors import UsageError

DATA = TensorDataset(torch.arange(64))


def sampler(size: int = 4, **options) -> ResizableBatchSampler:
    return ResizableBatchSampler(SequentialSampler(DATA), size, **options)


def sizes(loader, knob, at: dict[int, float]) -> list[int]:
    """The sizes of an epoch's batches; after batch number n the knob is set to at[n]."""
    found, items = [], []
    for n, (batch,) in enumerate(loader):
        found.append(len(batch))
        items += batch.tolist()
        if n in at:
            knob.set(at[n])
    assert items == sorted(set(items))  # each item once, in order
    return found


def test_batches_grow_and_shrink_between_two_draws():
    batches = sampler()
    loader = DataLoader(DATA, batch_sampler=batches)
    assert sizes(loader, SampledBatches(loader), {1: 2, 3: 4, 5: 1}) == [4, 4, 8, 8, 16, 16, 4, 4]


def test_each_item_is_drawn_once_an_epoch_at_any_size():
    loader = DataLoader(DATA, batch_sampler=sampler(5))
    assert sizes(loader, SampledBatches(loader), {0: 2}) == [5, *[10] * 5, 9]


def test_a_last_batch_that_is_short_can_be_dropped():
    loader = DataLoader(DATA, batch_sampler=sampler(5, drop_last=True))
    assert sizes(loader, SampledBatches(loader), {0: 2}) == [5, *[10] * 5]


def test_workers_take_a_new_size_up_after_what_they_have_drawn_ahead():
    loader = DataLoader(DATA, batch_sampler=sampler(), num_workers=2, prefetch_factor=2)
    found = sizes(loader, SampledBatches(loader), {0: 2})
    assert sum(found) == 64
    assert found[:5] == [4] * 5  # one and what two workers have drawn two ahead
    assert set(found[5:-1]) == {8}


def test_the_length_is_that_of_an_epoch_at_the_present_size():
    batches = sampler()
    assert len(batches) == 16
    SampledBatches(batches).set(2)
    assert len(batches) == 8


def test_closing_goes_back_to_the_first_size():
    batches = sampler()
    knob = SampledBatches(batches)
    knob.set(4)
    knob.close()
    assert batches.batch_size == 4


def test_ranks_with_samplers_of_their_own_stay_in_step():
    found = []
    for rank in range(2):
        own = DistributedSampler(DATA, num_replicas=2, rank=rank, shuffle=False)
        loader = DataLoader(DATA, batch_sampler=ResizableBatchSampler(own, 4))
        found.append(sizes(loader, SampledBatches(loader), {1: 2}))
    assert found[0] == found[1] == [4, 4, 8, 8, 8]


@pytest.mark.parametrize("size", [0, 2.5, "8"])
def test_a_batch_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match="batch_size must be an integer >= 1, got"):
        sampler(size)


def test_windows_widen_between_two_steps():
    accumulation = Accumulation(2)
    lengths = []
    for window in accumulation.windows(range(20)):
        lengths.append(len(window))
        if len(lengths) == 2:
            accumulation.set(2)
    assert lengths == [2, 2, 4, 4, 4, 4]


def test_windows_hold_each_batch_once_and_the_last_may_be_short():
    windows = list(Accumulation(3).windows(range(8)))
    assert list(itertools.chain(*windows)) == list(range(8))
    assert [len(w) for w in windows] == [3, 3, 2]
