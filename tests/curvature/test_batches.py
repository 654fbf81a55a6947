"""Batches of any type: copied before a loss can spoil them, counted, cut and known again."""

from __future__ import annotations

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import mlp
from states import same
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature import batches
from geomwatch.curvature.cutting import Cutter


def spoiling(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    labels = batch.pop("labels")
    batch["inputs"].mul_(0.5)
    batch["more"]["weights"][0] = 7
    batch["array"] += 1
    batch["extra"].clear()
    return F.cross_entropy(model(batch["inputs"]), labels)


def test_a_loss_that_spoils_its_batch_spoils_a_copy():
    batch = {
        "inputs": torch.randn(9, 5),
        "labels": torch.randint(0, 3, (9,)),
        "more": {"weights": torch.ones(3)},
        "array": np.zeros(2),
        "extra": [1, 2],
    }
    before = copy.deepcopy(batch)
    model = mlp(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, spoiling, optimizer)
    spoiling(model, copy.deepcopy(batch)).backward()
    record = monitor.step(batch)
    assert record["lambda_max"].value > 0
    assert same(before, batch)


class Custom:
    """A batch type of one's own, as the DataLoader's documentation shows it."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def pin_memory(self) -> Custom:
        return self


class Stored(collections.abc.MutableMapping):
    """A mapping whose shallow copy shares its items."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    inputs: Tensor
    labels: Tensor


Named = collections.namedtuple("Named", "inputs labels")

BATCHES: dict[str, Callable[..., Any]] = {
    "dict": dict,
    "UserDict": collections.UserDict,
    "OrderedDict": collections.OrderedDict,
    "custom object": Custom,
    "custom mapping": Stored,
    "proxy": lambda **items: types.MappingProxyType(items),
    "namespace": types.SimpleNamespace,
    "dataclass with slots": Slots,
    "namedtuple": Named,
    "nested": lambda **items: [({"all": (items["inputs"], [items["labels"]])},)],
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_of_any_type_is_copied_counted_and_cut(make):
    inputs, labels = torch.randn(9, 5), torch.randint(0, 3, (9,))
    batch = make(inputs=inputs, labels=labels)
    replica = batches.fresh_copy(batch)
    copied = list(batches.tensors(replica))
    assert type(replica) is (dict if isinstance(batch, types.MappingProxyType) else type(batch))
    assert same(copied, [inputs, labels])
    copied[0].zero_()
    assert bool(inputs.any())
    assert [id(t) for t in batches.tensors(batch)] == [id(inputs), id(labels)]
    assert Cutter().count(batch) == 9
    assert [len(t) for t in batches.tensors(Cutter().head(batch, 4))] == [4, 4]
    assert [len(t) for t in batches.tensors(batch)] == [9, 9]


def test_taking_from_a_copied_mapping_leaves_the_users_mapping_alone():
    batch = Stored(inputs=torch.randn(9, 5), labels=torch.zeros(9))
    batches.fresh_copy(batch).pop("labels")
    assert len(batch) == 2


def test_what_is_no_batch_is_passed_through():
    module, words = mlp(5, 3), ["a", "b"]
    replica = batches.fresh_copy((module, words, torch.Size([2]), 3, None))
    assert replica[0] is module
    assert replica[1:] == (words, torch.Size([2]), 3, None)
    assert replica[1] is not words


def test_a_copied_input_still_requires_its_gradient():
    x = torch.ones(3, requires_grad=True)
    inputs, derived = batches.fresh_copy((x, 2 * x))
    assert inputs.requires_grad
    assert inputs.is_leaf
    assert derived.requires_grad
    assert derived.is_leaf


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.cfloat]
)
def test_a_fingerprint_knows_a_reordered_batch_and_tells_another(dtype):
    inputs, flags = torch.randn(9, 5), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0]).to(dtype)
    mark = batches.fingerprint({"x": inputs, "flags": flags})
    order = torch.randperm(9)
    assert batches.fingerprint({"x": inputs[order], "flags": flags[order]}) == pytest.approx(mark)
    other = flags.clone()
    other[0] = 0
    assert batches.fingerprint({"x": inputs, "flags": other}) != pytest.approx(mark)
