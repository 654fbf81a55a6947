"""A physics-informed net: u'' = f on [0, 1] with u = 0 at both ends, whose answer is known."""

import math

import torch
from torch import Tensor, nn

from tasks import nets
from tasks.sources import Batch, Drawn
from tasks.task import Task

WAVES = ((1, 1.0), (3, 0.2))  # u = the sum of a sin(k pi x)
ENDS = torch.tensor([[0.0], [1.0]])


def draw(rng: torch.Generator, size: int) -> Batch:
    return torch.rand(size, 1, generator=rng)


def loss(model: nn.Module, x: Batch) -> Tensor:
    """The equation's residual over the variance of f, and the ends."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), x, create_graph=True)[0]
    force = sum(-a * (k * math.pi) ** 2 * torch.sin(k * math.pi * x) for k, a in WAVES)
    scale = sum(a**2 * (k * math.pi) ** 4 / 2 for k, a in WAVES)
    return (bend - force).square().mean() / scale + model(ENDS).square().mean()


TASK = Task(
    "pinn-poisson",
    "physics-informed",
    lambda: nets.mlp((1, 32, 32, 1), nn.Tanh),
    Drawn(draw),
    loss,
    steps=400,
    batch=64,
    nothing=1.0,
)
