"""What a loss changes in Python objects is put back, or named."""

from __future__ import annotations

import collections
import copy
import logging
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, mlp
from states import assert_same, same
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.isolation.snapshot import Snapshot


class Busy(nn.Module):
    """Keeps every kind of state that can be put back, and changes all of it in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.count = 0
        self.seen: list[int] = []
        self.cache: dict[str, Any] = {"old": torch.zeros(3), "nested": {"deep": [1, [2]]}}
        self.names = {"a"}
        self.recent = collections.deque([1, 2], maxlen=2)
        self.ordered = collections.OrderedDict(first=1, second=2)
        self.tally = collections.Counter(calls=1)
        self.pair = (torch.zeros(2), [5])
        self.average = torch.zeros(3)
        self.mask = torch.zeros(1, 3).expand(9, 3)
        self.histogram = np.zeros(4)
        self.numpy_rng = np.random.default_rng(0)
        self.legacy_rng = np.random.RandomState(0)
        self.python_rng = random.Random(0)
        self.torch_rng = torch.Generator().manual_seed(0)
        self.hidden = [nn.BatchNorm1d(3)]  # in a plain list, where modules() does not find it
        self.toggled = nn.Parameter(torch.ones(3), requires_grad=False)
        self.swapped = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(self.count)
        self.cache["new"] = x
        self.cache["nested"]["deep"][1].append(3)
        self.cache["old"] = self.cache["old"] + 1
        self.names.add("b")
        self.recent.append(3)
        self.ordered.move_to_end("first")
        self.tally["calls"] += 1
        self.tally["more"] += 1
        self.pair[0].add_(1)
        self.pair[1].append(6)
        self.average.mul_(0.9).add_(1.0)
        self.histogram[0] += 1
        noise = self.numpy_rng.normal() + self.legacy_rng.normal() + self.python_rng.random()
        y = self.linear(x) + noise + torch.rand(3, generator=self.torch_rng)
        self.toggled.requires_grad_(True)
        self.swapped.data = self.swapped.data * 2
        return self.hidden[0](y) * self.swapped

    def state(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if k[0] != "_" and not k.endswith("_rng")}
        kept |= {
            "numpy": self.numpy_rng.bit_generator.state,
            "legacy": self.legacy_rng.get_state()[1],
            "python": self.python_rng.getstate(),
            "torch": self.torch_rng.get_state(),
            "hidden": self.hidden[0].state_dict(),
            "toggled": self.toggled.requires_grad,
            "swapped": self.swapped.detach(),
        }
        return copy.deepcopy(kept)


def test_python_state_of_every_kind_is_put_back():
    model, batch = Busy(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    before = model.state()
    identities = {name: id(value) for name, value in vars(model).items() if name != "count"}
    place = model.swapped.data_ptr()
    with Objective(model, cross_entropy, [batch, batch]) as objective:
        first, second = objective.gradient(), objective.hvp(torch.ones(objective.layout.dim))
        assert not same(before, model.state())
        assert objective.changed_objects == []
    assert bool(first.any())
    assert bool(second.any())
    assert_same(before, model.state())
    assert {n: id(value) for n, value in vars(model).items() if n != "count"} == identities
    assert model.swapped.data_ptr() == place


def test_every_evaluation_starts_from_the_same_python_state():
    model, batch = Busy(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    v = torch.ones(21)
    with Objective(model, cross_entropy, [batch, batch]) as objective:
        assert torch.equal(objective.hvp(v), objective.hvp(v))


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


class Slotted:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


class Bank:
    def __init__(self) -> None:
        self.total = {"features": torch.zeros(3)}


class Metered(nn.Module):
    def __init__(self, meter: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.meter = meter

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.meter, Bank):
            self.meter.total["features"].add_(1)
        else:
            self.meter.total += 1
        return self.linear(x)


@pytest.mark.parametrize("meter", [Meter(), Slotted(), Bank()], ids=lambda m: type(m).__name__)
def test_an_object_that_cannot_be_put_back_is_named_in_one_warning(meter, caplog):
    model, batch = Metered(meter), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, every=1)
    with caplog.at_level(logging.WARNING, "geomwatch"):
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
    named = [m for m in caplog.messages if f"Metered.meter ({type(meter).__name__})" in m]
    assert len(named) == 1
    assert "loss_fn=" in named[0]
    assert "also=" in named[0]


def test_an_object_that_is_only_read_raises_no_warning(caplog):
    model, batch = Metered(Meter()), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with Objective(model, lambda m, b: F.cross_entropy(m.linear(b[0]), b[1]), [batch]) as objective:
        assert objective.is_finite()
        assert objective.changed_objects == []


def test_an_object_that_also_names_is_put_back_instead_of_watched():
    meter = Meter()
    model, batch = Metered(meter), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with Objective(model, cross_entropy, [batch], how=Settings(also=(meter,))) as objective:
        assert objective.is_finite()
        assert meter.total == 1
        assert objective.changed_objects == []
    assert meter.total == 0


@pytest.mark.parametrize(
    "large",
    [torch.zeros(1_000_001), nn.Parameter(torch.zeros(1_000_001), requires_grad=False)],
    ids=["attribute", "frozen parameter"],
)
def test_a_large_tensor_that_is_not_trained_is_watched_and_not_copied(large):
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    model.large = large
    with Objective(model, cross_entropy, [batch]) as objective:
        assert objective.is_finite()
        assert objective.changed_objects == []
        large[0] = 1
        assert objective.changed_objects == ["Sequential.large"]


def test_an_inference_tensor_as_an_attribute_disturbs_nothing():
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with torch.inference_mode():
        model.last = model(batch[0])
    assert geomwatch.measure(model, cross_entropy, batch)["lambda_max"].value > 0


def test_a_long_list_is_put_back_without_looking_at_its_items():
    holder = types.SimpleNamespace(log=[[0] for _ in range(1_001)])
    snapshot = Snapshot([holder])
    holder.log.append([1])
    holder.log[0].append(1)
    snapshot.finish()
    assert len(holder.log) == 1_001
    assert holder.log[0] == [0, 1]
