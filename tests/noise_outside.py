"""A loss with noise from outside of the model, trained with and without a monitor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import geomwatch


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


def denoised(model: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    return (model(x + 0.5 * noise) - x[:, :4]).square().mean()


def weights_after(make: Callable[[], tuple[Any, Any]], *, watched: bool, steps: int = 5) -> Tensor:
    torch.manual_seed(0)
    loss_fn, collate = make()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=2) if watched else None
    for _ in range(steps):
        batch = collate(torch.randn(16, 6))
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch, loss=loss.detach())
        optimizer.step()
    if monitor is not None:
        assert len(monitor.history) > 1
        assert all(r["lambda_max"].status == "ok" for r in monitor.history)
    return nn.utils.parameters_to_vector(model.parameters())


def assert_unseen(make: Callable[[], tuple[Any, Any]]) -> None:
    assert torch.equal(weights_after(make, watched=False), weights_after(make, watched=True))
