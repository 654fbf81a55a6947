"""Training loops on digits that several tests of the monitor share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

from geomwatch import Alert, Monitor, Record

Batch = tuple[Tensor, Tensor]

DENSE = [0, 1, 2, 3, 5, 8]


def draws(seed: int = 0, size: int = 64) -> Iterator[Batch]:
    """Random batches of digits without end."""
    inputs, targets = digits(1797)
    rng = torch.Generator().manual_seed(seed)
    while True:
        pick = torch.randint(0, len(inputs), (size,), generator=rng)
        yield inputs[pick], targets[pick]


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def small() -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    return model, sgd(model)


def train(
    model: nn.Module,
    optimizer: Any,
    monitor: Monitor | None,
    steps: int,
    *,
    batches: Iterator[Batch] | None = None,
    before: Callable[[int], None] = lambda step: None,
    loss_fn: Callable[[Any, Batch], Tensor] = cross_entropy,
    pass_loss: bool = True,
) -> list[Record | None]:
    """The loop of the README; `before(step)` is called before each monitor.step."""
    returned = []
    for step, batch in enumerate(itertools.islice(batches or draws(), steps)):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        before(step)
        if monitor is not None:
            returned.append(monitor.step(batch, loss=loss.detach() if pass_loss else None))
        optimizer.step()
    return returned


def loud(alerts: list[Alert]) -> list[Alert]:
    return [alert for alert in alerts if alert.severity != "info"]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class HandMade:
    """Gradient descent by somebody who does not derive from torch.optim.Optimizer."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.param_groups = [{"params": list(model.parameters()), "lr": lr}]

    def zero_grad(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p -= self.param_groups[0]["lr"] * p.grad
