"""Steps ahead over the last batches: they leave no trace, and tell what a rate would do."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from problems import cross_entropy, mlp
from torch import Tensor, nn
from undisturbed import NETS

import geomwatch
from geomwatch.monitoring.rehearser import Rehearser
from geomwatch.rules import Headroom

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


class Heavy(torch.optim.Optimizer):
    """A stranger: momentum in a nested list, and a counter of its own."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    (moving,) = self.state[p].setdefault("moving", [torch.zeros_like(p)])
                    p.sub_(group["lr"] * moving.mul_(0.9).add_(p.grad))


def trained(
    make: Callable[[], nn.Module],
    optimizer: Callable[..., Any],
    data: list[Any],
    *,
    watched: bool,
    loss_fn: Callable[..., Tensor] = cross_entropy,
) -> tuple[Any, list[Any], geomwatch.Monitor | None]:
    """Train under a ramp; return all that training leaves, and what was rehearsed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = make()
    inner = optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LinearLR(inner, 0.02, total_iters=len(data))
    rehearsed: list[Any] = []

    class Listening:
        name = "listening"

        def __call__(self, step):
            rehearsed.extend(step.rehearsed)
            if step.index == 9:
                rehearsed.append(step.rehearsals(0.5))

    rules = [Headroom(), Listening()]
    monitor = geomwatch.Monitor(model, loss_fn, inner, rules=rules) if watched else None
    for batch in data:
        inner.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch, loss=loss.detach())
        inner.step()
        schedule.step()
    left = [model.state_dict(), inner.state_dict(), schedule.state_dict(), torch.get_rng_state()]
    left += [{k: v for k, v in vars(inner).items() if isinstance(v, int)}]
    return copy.deepcopy(left), rehearsed, monitor


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize(
    ("net", "optimizer"),
    [
        ("BatchNorm, dropout and other generators", lambda p: SGD(p, lr=9.0, momentum=0.9)),
        ("spectral norm by hooks", lambda p: ADAM(p, lr=0.9, amsgrad=True)),
        ("tied embedding", lambda p: torch.optim.NAdam(p, lr=0.9)),
        ("LSTM", lambda p: Heavy(p, lr=9.0)),
    ],
)
def test_training_is_bit_identical_with_rehearsals(net, optimizer):
    kind = NETS[net]
    torch.manual_seed(1)
    data = [kind.batch() for _ in range(12)]
    bare, _, _ = trained(kind.make, optimizer, data, watched=False)
    left, rehearsed, _ = trained(kind.make, optimizer, data, watched=True)
    assert rehearsed
    assert None not in rehearsed
    assert same(bare, left)


def test_a_rehearsal_that_fails_leaves_no_trace_and_says_why(caplog):
    kind = NETS["convolution"]
    torch.manual_seed(1)
    data = [kind.batch() for _ in range(11)]

    def fragile(model: nn.Module, batch: Any) -> Tensor:
        loss = cross_entropy(model, batch)
        if fragile.calls == 0:  # type: ignore[attr-defined]
            raise RuntimeError("no more")
        fragile.calls -= 1  # type: ignore[attr-defined]
        return loss

    fragile.calls = 10**6  # type: ignore[attr-defined]
    optimizer = lambda p: SGD(p, lr=0.2, momentum=0.9)  # noqa: E731
    bare, _, _ = trained(kind.make, optimizer, data, watched=False)
    left, _, monitor = trained(kind.make, optimizer, data, watched=True, loss_fn=fragile)
    assert same(bare, left)
    assert monitor is not None
    model = monitor.params[0].detach().clone()
    fragile.calls = 5  # type: ignore[attr-defined]
    caplog.set_level("INFO", "geomwatch")
    found = monitor.headroom()
    assert found.value is None
    assert "no more" in found.reason
    assert "steps ahead are not rehearsed: RuntimeError: no more" in caplog.text
    assert torch.equal(model, monitor.params[0])


class Closing(torch.optim.SGD):
    """Needs to evaluate the loss by itself."""

    def step(self, closure):
        closure()
        return super().step()


def test_what_can_not_be_rehearsed_is_refused_with_a_reason():
    torch.manual_seed(0)
    model, data = mlp(4, 8, 3), (torch.randn(9, 4), torch.randint(0, 3, (9,)))

    def reason(optimizer: Any) -> str:
        monitor = geomwatch.Monitor(model, cross_entropy, optimizer, rules=[])
        for _ in range(9):
            optimizer.zero_grad()
            loss = cross_entropy(model, data)
            loss.backward()
            monitor.step(data, loss=loss.detach())
            optimizer.step(lambda: None)
        return monitor.headroom().reason

    assert reason(Closing(model.parameters(), lr=0.1)) == "step() of Closing needs closure"
    assert "steps other parameters" in reason(SGD(model[0].parameters(), lr=0.1))
    unready = geomwatch.Monitor(model, cross_entropy, SGD(model.parameters(), lr=0.1))
    assert unready.headroom().reason == "needs the losses and batches of 8 steps"


def test_headroom_of_a_quadratic_is_that_of_its_limit():
    """L = 2 w^2: lambda = 4, SGD diverges above 2 / lambda = 0.5, and by steps above that."""
    weight = nn.Linear(1, 1, bias=False)
    nn.init.constant_(weight.weight, 1.0)
    optimizer = SGD(weight.parameters(), lr=0.0625)
    batch = torch.ones(4, 1)
    quadratic = lambda model, x: 2 * model(x).square().mean()  # noqa: E731
    monitor = geomwatch.Monitor(weight, quadratic, optimizer, rules=[])
    for _ in range(9):
        optimizer.zero_grad()
        loss = quadratic(weight, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()
    found = monitor.headroom()
    assert found.value is not None
    assert found.error is not None
    # eight steps that grow by 1.2 each lose a fifth of what nine have learnt
    assert found.value + found.error >= 0.5 / 0.0625
    assert found.value <= 1.35 * 0.5 / 0.0625
    assert float(optimizer.param_groups[0]["lr"]) == 0.0625


def test_clipped_gradients_are_clipped_ahead_too():
    torch.manual_seed(0)
    model, data = mlp(4, 8, 3), (torch.randn(32, 4), torch.randint(0, 3, (32,)))
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, rules=[])
    for _ in range(9):
        optimizer.zero_grad()
        loss = cross_entropy(model, data)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        monitor.step(data, loss=loss.detach(), grad_norm=norm)
        optimizer.step()
    assert monitor.headroom(most=64).value == 64  # steps of 1e-5 move nothing


def test_the_rate_has_to_grow_before_anybody_asks():
    rehearser, window = Rehearser(), [torch.zeros(1)]
    due = []
    for step in range(40):
        rehearser.keep(step, (0.1 * 1.1**step if step < 20 else 0.1,), window)
        rehearser.learn(step, 1.0 - step / 100)
        if rehearser.due():
            due.append(step)
            rehearser.ahead(lambda _, multiples: [0.0] * len(multiples), (2.0,))
    assert due == [7, 11, 15, 19]
