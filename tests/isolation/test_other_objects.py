"""Modules and generators beside the model, found in the loss or named in also=."""

from __future__ import annotations

import functools
import random
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faces import faced
from problems import cross_entropy, mlp
from states import assert_same, everything, same
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.isolation.reach import captured_by


def teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


TEACHER = teacher()


def distil(student: nn.Module, batch: Any, *, by: nn.Module) -> Tensor:
    return F.mse_loss(student(batch[0]), by(batch[0]))


def distil_by_global(student: nn.Module, batch: Any) -> Tensor:
    return (lambda: distil(student, batch, by=TEACHER))()


def distil_by_helper(student: nn.Module, batch: Any) -> Tensor:
    return distil_by_global(student, batch)


class Host:
    """A host object whose method is the loss, as Lightning's and transformers' are."""

    def __init__(self, by: nn.Module) -> None:
        self.by = by
        self.calls = 0

    def loss(self, student: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return distil(student, batch, by=self.by)

    def __call__(self, student: nn.Module, batch: Any) -> Tensor:
        return self.loss(student, batch)


class Criterion(nn.Module):
    """A criterion with state, to be wrapped by geomwatch.supervised."""

    def __init__(self, by: nn.Module) -> None:
        super().__init__()
        self.by = by

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.by[1:](outputs), targets)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "closure": lambda t: lambda m, b: distil(m, b, by=t),
    "default": lambda t: lambda m, b, t=t: distil(m, b, by=t),
    "partial": lambda t: functools.partial(distil, by=t),
    "nested closure": lambda t: (lambda f: lambda m, b: f(m, b))(functools.partial(distil, by=t)),
    "method": lambda t: Host(t).loss,
    "callable": lambda t: Host(t),
    "criterion": lambda t: geomwatch.supervised(Criterion(t)),
    "module": lambda t: types.MethodType(distil_module, t),
}


def distil_module(self: nn.Module, student: nn.Module, batch: Any) -> Tensor:
    return distil(student, batch, by=self)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_teacher_that_the_loss_carries_along_is_isolated(way):
    other = teacher()
    assert_isolated(way(other), other)


@pytest.mark.parametrize("loss_fn", [distil_by_global, distil_by_helper])
def test_a_teacher_that_is_a_global_of_the_script_is_isolated(loss_fn):
    assert_isolated(loss_fn, TEACHER)


def test_a_teacher_that_only_also_names_is_isolated():
    other = teacher()
    owner = {"teacher": other}  # found by nobody: dictionaries in closures are not searched
    assert_isolated(lambda m, b: distil(m, b, by=owner["teacher"]), other, also=(other,))
    assert_isolated(lambda m, b: distil(m, b, by=owner["teacher"]), other, also=other)


def assert_isolated(loss_fn: Any, other: nn.Module, **options: Any) -> None:
    student, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    calls: list[int] = []
    handle = other[0].weight.register_hook(lambda _: calls.append(1))
    loss_fn(student, batch).backward()  # leaves gradients in the teacher too
    calls.clear()
    host = getattr(loss_fn, "__self__", loss_fn)
    before = everything(other), everything(student), getattr(host, "calls", None)
    record = geomwatch.measure(student, loss_fn, batch, **faced(options))
    handle.remove()
    assert record["lambda_max"].value is not None
    assert_same(before[0], everything(other))
    assert_same(before[1], everything(student))
    assert getattr(host, "calls", None) == before[2]
    assert calls == []
    assert all(m.training for m in other.modules())


def test_a_private_generator_named_in_also_is_replayed():
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    owner = {"rng": torch.Generator().manual_seed(0), "python": random.Random(0)}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn(9, 5, generator=owner["rng"]) * owner["python"].random()
        return cross_entropy(model, (batch[0] + noise, batch[1]))

    state = owner["rng"].get_state(), owner["python"].getstate()
    with Objective(
        model, loss_fn, [batch, batch], how=Settings(also=tuple(owner.values()))
    ) as objective:
        v = torch.ones(objective.layout.dim)
        assert torch.equal(objective.hvp(v), objective.hvp(v))
    assert same(state, (owner["rng"].get_state(), owner["python"].getstate()))


def test_the_captured_objects_are_the_modules_and_owners_only():
    other, numbers = teacher(), [1, 2]
    assert captured_by(lambda m, b: (other, numbers)) == [other]
    assert captured_by(F.cross_entropy) == []
    assert captured_by(len) == []
    host = Host(other)
    assert captured_by(host.loss) == [host]
