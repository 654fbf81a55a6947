"""Contrastive learning on digits: two views of each must find one another (InfoNCE)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import data, nets
from tasks.sources import Batch, Items
from tasks.task import Task

BATCH, TEMPERATURE = 64, 0.2


def view(pixels: Tensor) -> Tensor:
    """Noise, and a fifth of the pixels gone."""
    return (pixels + 0.1 * torch.randn_like(pixels)) * (torch.rand_like(pixels) > 0.2)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """No mean over items: each is told from all others of the batch."""
    first, second = (F.normalize(model(view(batch[0])), dim=1) for _ in range(2))
    return F.cross_entropy(first @ second.T / TEMPERATURE, torch.arange(len(first)))


TASK = Task(
    "contrastive-digits",
    "contrastive",
    lambda: nets.mlp((64, 128, 128, 32)),
    Items(data.digits),
    loss,
    batch=BATCH,
    nothing=math.log(BATCH),
)
