"""A mixture of experts on digits: one of four is asked, and asked evenly (Fedus et al. 2021)."""

import torch
from torch import Tensor, nn

from tasks import data, nets
from tasks.sources import Batch, Items
from tasks.task import Classification, cross_entropy

EXPERTS = 4


class Mixture(nn.Module):
    """A router, and experts of which the most likely answers; `balance` is 1 when all are asked."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nets.mlp((64, 64, 32))
        self.router = nn.Linear(32, EXPERTS)
        self.experts = nn.ModuleList(nets.mlp((32, 64, 10)) for _ in range(EXPERTS))

    def forward(self, pixels: Tensor) -> Tensor:
        """(items, 64) -> (items, 10) logits."""
        hidden = self.trunk(pixels).relu()
        share = self.router(hidden).softmax(1)
        weight, chosen = share.max(1, keepdim=True)
        self.balance = EXPERTS * (share.mean(0) * torch.eye(EXPERTS)[chosen[:, 0]].mean(0)).sum()
        answers = torch.stack([expert(hidden) for expert in self.experts], dim=1)
        return weight * answers[torch.arange(len(pixels)), chosen[:, 0]]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model, batch) + 0.01 * model.balance


TASK = Classification("moe-digits", "mixture of experts", Mixture, Items(data.digits), loss)
