"""Regression on a table made up like a real one: skewed, correlated columns, a jagged target."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import nets
from tasks.sources import Batch, Drawn
from tasks.task import Task


def draw(rng: torch.Generator, size: int) -> Batch:
    """Eight columns and a target, each of mean 0 and variance 1 or nearly."""
    z = torch.randn(size, 8, generator=rng)
    income, age, rooms = z[:, 0].exp() - 1.65, z[:, 1], 0.7 * z[:, 0] + 0.7 * z[:, 2]
    place = torch.sin(2 * z[:, 3]) * torch.cos(2 * z[:, 4])
    target = 0.25 * income + 0.3 * rooms * age + 0.6 * place + 0.3 * (z[:, 5] > 0.5) - 0.1
    noise = 0.2 * torch.randn(size, generator=rng)
    columns = torch.stack([income / 2.16, age, rooms, *z[:, 3:].T], dim=1)
    return columns, (target + noise).unsqueeze(1) / 0.737


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


TASK = Task(
    "regression-table",
    "regression",
    lambda: nets.mlp((8, 64, 64, 1)),
    Drawn(draw),
    loss,
    steps=300,
    nothing=1.0,
)
