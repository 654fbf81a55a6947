"""A model of sets: the largest distance from the centre, by sums (Zaheer et al. 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import nets
from tasks.sources import Batch, Drawn
from tasks.task import Task


class DeepSets(nn.Module):
    """A net for each point, their sum, a net for that."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nets.mlp((2, 64, 64)), nets.mlp((64, 64, 1))

    def forward(self, points: Tensor) -> Tensor:
        """(items, points, 2) -> (items, 1)."""
        flat = self.each(points.flatten(0, 1))
        return self.all(flat.view(*points.shape[:2], -1).sum(1))


def draw(rng: torch.Generator, size: int) -> Batch:
    points = torch.randn(size, 8, 2, generator=rng)
    radius = points.norm(dim=2).max(1, keepdim=True).values
    return points, (radius - 2.28) / 0.51  # of mean 0 and variance 1


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


TASK = Task("deepsets-max", "sets", DeepSets, Drawn(draw), loss, nothing=1.0)
