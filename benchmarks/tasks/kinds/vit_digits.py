"""A vision transformer on 8 x 8 digits: 16 patches of 2 x 2, a class token, pre-norm."""

import torch
from torch import Tensor, nn

from tasks import data
from tasks.sources import Items
from tasks.task import Classification


class ViT(nn.Module):
    """Two layers of width 32 over patches; the class token is read."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(17, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """(items, 64) -> (items, 10) logits."""
        patches = self.patches(pixels.view(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(pixels), -1, -1), patches], dim=1)
        return self.head(self.encoder(tokens + self.position)[:, 0])


TASK = Classification("vit-digits", "classification", ViT, Items(data.digits), batch=32)
