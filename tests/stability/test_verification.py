"""The first steps of an optimizer tell what it is, and whether it is what it was said to be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import geomwatch
from geomwatch.stability import registry
from geomwatch.stability.registry import known_of
from geomwatch.stability.verification import FirstSteps


class Copied(torch.optim.AdamW):
    """AdamW whose step is its own code, as those of other libraries are."""

    factor = 1.0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.factor)
        return torch.optim.AdamW.step(self, closure)


class Signs(torch.optim.Optimizer):
    """Steps by signs, whatever the state."""

    def __init__(self, params: Any, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


@pytest.fixture
def clean() -> Iterator[None]:
    yield
    registry._REGISTERED.clear()


def first_steps(optimizer: Any, w: torch.Tensor, count: int = 3) -> list[str]:
    looked, said = FirstSteps(optimizer, [w]), []
    for step in range(count):
        w.grad = torch.linspace(1 + step, -2, w.numel())
        if looked.is_open:
            looked.before()
        optimizer.step()
        said.append(looked.after())
    return [words for words in said if words]


def test_a_class_that_nobody_knows_is_recognised_by_three_steps():
    w = torch.ones(7, requires_grad=True)
    optimizer = Copied([w], lr=0.01)
    assert not known_of(optimizer).has_formula
    (said,) = first_steps(optimizer, w)
    assert said == "Copied steps as AdamW does, to 1 % in 3 steps, and is judged so"
    assert known_of(optimizer).has_formula


def test_two_steps_are_not_enough_and_other_steps_are_nothing_known():
    w = torch.ones(7, requires_grad=True)
    assert not first_steps(Copied([w]), w, count=2)
    signs = Signs([w])
    assert not first_steps(signs, w)
    assert not known_of(signs).has_formula


@pytest.mark.usefixtures("clean")
def test_an_entry_that_contradicts_the_step_is_told_with_both_numbers():
    geomwatch.register_optimizer(Signs, like="SGD")
    w = torch.ones(4, requires_grad=True)
    optimizer = Signs([w], lr=0.1)
    (said,) = first_steps(optimizer, w)
    assert "a step of length 0.2449 was predicted, one of 0.1732 was taken" in said
    assert "Its margins are withheld" in said
    assert not known_of(optimizer).has_formula


def test_an_update_near_the_rounding_of_its_weights_tells_nothing():
    w = torch.full((7,), 1e4, requires_grad=True)
    optimizer = Copied([w], lr=1e-5)
    assert not first_steps(optimizer, w)
    assert not known_of(optimizer).has_formula


def run(optimizer_of: Any, steps: int) -> geomwatch.Monitor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = torch.randn(32, 6), torch.randint(0, 3, (32,))
    loss_fn, optimizer = geomwatch.supervised(nn.CrossEntropyLoss()), optimizer_of(model)
    with geomwatch.Monitor(model, loss_fn, optimizer, every=2) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
    return monitor


def test_a_monitor_takes_over_what_steps_have_shown():
    monitor = run(lambda model: Copied(model.parameters(), lr=0.01), 6)
    found = [record["stability_margin"].status for record in monitor.history]
    assert found[0] == "unknown"
    assert found[-1] == "ok"


def test_steps_that_raise_the_loss_of_their_batch_are_announced():
    loud = run(lambda model: Signs(model.parameters(), lr=3.0), 4)
    quiet = run(lambda model: Signs(model.parameters(), lr=0.01), 12)
    assert next((a.rule, a.severity) for a in loud.alerts) == ("taken_step", "critical")
    assert not quiet.alerts
