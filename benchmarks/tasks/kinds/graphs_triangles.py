"""A graph net: how many triangles a random graph has, from its dense adjacency."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.sources import Batch, Drawn
from tasks.task import Task

NODES = 10


class GraphNet(nn.Module):
    """Three rounds of messages with LayerNorm, summed over the nodes."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(2, width)
        self.messages = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, 1)

    def forward(self, edges: Tensor) -> Tensor:
        """(items, nodes, nodes) -> (items, 1)."""
        degree = edges.sum(2, keepdim=True) / NODES
        x = self.first(torch.cat([degree, edges @ degree / NODES], dim=2))
        for message, norm in zip(self.messages, self.norms, strict=True):
            heard = edges @ x / NODES
            x = x + F.relu(norm(message(torch.cat([x, heard], dim=2))))
        return self.head(x.mean(1))


def draw(rng: torch.Generator, size: int) -> Batch:
    """Erdos-Renyi graphs of random density; the target is of mean 0 and variance 1 or nearly."""
    density = 0.2 + 0.6 * torch.rand(size, 1, 1, generator=rng)
    upper = (torch.rand(size, NODES, NODES, generator=rng) < density).float().triu(1)
    edges = upper + upper.transpose(1, 2)
    triangles = (edges @ edges @ edges).diagonal(dim1=1, dim2=2).sum(1) / 6
    return edges, ((triangles + 1).log() - 2.52).unsqueeze(1) / 1.19


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


TASK = Task("graphs-triangles", "graphs", GraphNet, Drawn(draw), loss, nothing=1.0)
