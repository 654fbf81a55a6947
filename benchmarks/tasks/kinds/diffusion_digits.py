"""Denoising diffusion on digits: predict the noise of a random level (Ho et al. 2020)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import data, nets
from tasks.sources import Batch, Items
from tasks.task import Task

LEVELS = 100


class Denoiser(nn.Module):
    """An MLP over the noisy pixels and sinusoids of the level."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nets.mlp((64 + 16, 192, 192, 64), nn.SiLU)

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        """(items, 64), (items,) in 0..1 -> the noise, (items, 64)."""
        angles = level[:, None] * math.pi * 2.0 ** torch.arange(8)
        return self.net(torch.cat([noisy, angles.sin(), angles.cos()], dim=1))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Levels and noise are drawn anew from the global generator, as people do."""
    pixels = 2 * batch[0] - 1
    level = torch.randint(1, LEVELS, (len(pixels),)) / LEVELS
    signal = torch.cos(0.5 * math.pi * level)[:, None]
    noise = torch.randn_like(pixels)
    noisy = signal * pixels + (1 - signal**2).sqrt() * noise
    return F.mse_loss(model(noisy, level), noise)


TASK = Task(
    "diffusion-digits", "diffusion", Denoiser, Items(data.digits), loss, batch=64, nothing=1.0
)
