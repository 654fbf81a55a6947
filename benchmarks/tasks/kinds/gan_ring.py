"""A generator of eight points on a ring, against a critic that learns beside it.

The optimizer of the run trains the generator, whose loss says little: the critic moves. The score
is the energy distance between its points and the ring's (Szekely and Rizzo 2013).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import nets
from tasks.sources import Batch, Drawn
from tasks.task import Task


class Adversaries(nn.Module):
    """Both nets; the critic has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nets.mlp((4, 64, 64, 2))
        self.critic = nets.mlp((2, 64, 64, 1), nn.SiLU)
        self.teach = torch.optim.Adam(self.critic.parameters(), lr=2e-3, betas=(0.5, 0.9))


def draw(rng: torch.Generator, size: int) -> Batch:
    """Latents, and points of the ring."""
    angle = torch.randint(0, 8, (size,), generator=rng) * (math.pi / 4)
    ring = torch.stack([angle.cos(), angle.sin()], dim=1)
    points = ring + 0.05 * torch.randn(size, 2, generator=rng)
    return torch.randn(size, 4, generator=rng), points


def train_critic(model: Adversaries, batch: Batch) -> Batch:
    latents, points = batch
    made = model.generator(latents).detach()
    model.teach.zero_grad()
    points = points.requires_grad_()
    real, false = model.critic(points), model.critic(made)
    slope = torch.autograd.grad(real.sum(), points, create_graph=True)[0]
    wrong = F.softplus(-real).mean() + F.softplus(false).mean()
    (wrong + slope.square().sum(1).mean()).backward()  # R1 (Mescheder et al. 2018)
    model.teach.step()
    return batch


def loss(model: Adversaries, batch: Batch) -> Tensor:
    return F.softplus(-model.critic(model.generator(batch[0]))).mean()


@torch.no_grad()
def score(model: Adversaries) -> float:
    """Twice the mean distance between the two kinds, less those within each."""
    latents, points = SOURCE.held_out()
    made = model.generator(latents)
    between, within, among = (
        torch.cdist(a, b).mean() for a, b in ((made, points), (made, made), (points, points))
    )
    return float(2 * between - within - among)


SOURCE = Drawn(draw)
TASK = Task(
    "gan-ring",
    "adversarial",
    Adversaries,
    SOURCE,
    loss,
    batch=128,
    score=score,
    collect=train_critic,
    trained=lambda model: model.generator,
)
