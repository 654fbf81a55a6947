"""Several tasks at once on digits: which one, whether it is even, and how much ink it takes."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from tasks import data, nets
from tasks.sources import Batch, Items
from tasks.task import Task


class Shared(nn.Module):
    """One trunk, three heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nets.mlp((64, 96, 64))
        self.digit, self.even, self.ink = nn.Linear(64, 10), nn.Linear(64, 1), nn.Linear(64, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(items, 64) -> the outputs of the heads."""
        hidden = self.trunk(pixels).relu()
        return self.digit(hidden), self.even(hidden)[:, 0], self.ink(hidden)[:, 0]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    pixels, labels = batch
    digit, even, ink = model(pixels)
    wanted = (pixels.mean(1) - 0.305) / 0.034  # of mean 0 and variance 1
    return (
        F.cross_entropy(digit, labels)
        + F.binary_cross_entropy_with_logits(even, 1.0 - labels % 2)
        + F.mse_loss(ink, wanted)
    )


TASK = Task(
    "multitask-digits",
    "several tasks",
    Shared,
    Items(data.digits),
    loss,
    nothing=math.log(10) + math.log(2) + 1,
)
