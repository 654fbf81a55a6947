"""A variational autoencoder on digits: minus the evidence bound, in nats a pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import data, nets
from tasks.sources import Batch, Items
from tasks.task import Task


class VAE(nn.Module):
    """Eight latent variables."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nets.mlp((64, 128, 16))
        self.decoder = nets.mlp((8, 128, 64))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(items, 64) -> logits of the pixels, mean and log variance of the latents."""
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(latent), mean, log_variance


def loss(model: nn.Module, batch: Batch) -> Tensor:
    pixels, _ = batch
    logits, mean, log_variance = model(pixels)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean()
    return F.binary_cross_entropy_with_logits(logits, pixels) + divergence / pixels.shape[1]


TASK = Task("vae-digits", "variational autoencoder", VAE, Items(data.digits), loss, batch=64)
