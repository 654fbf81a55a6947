"""The nets: small ones of every kind that people train."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(widths: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """Fully connected, with these layer widths from the flattened input to the logits."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def conv_batch_norm(channels: int = 16) -> nn.Module:
    """Three strided convolutions, each with a BatchNorm, on (1, 28, 28) images."""
    layers: list[nn.Module] = []
    widths = [1, channels, 2 * channels, 2 * channels]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [
            nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(fan_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * channels, 10))


class ResNet18(nn.Module):
    """ResNet-18 with its BatchNorms, an eighth as wide (177k parameters), on one channel."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(
            num_channels=1,
            num_labels=10,
            embedding_size=width,
            hidden_sizes=[width, 2 * width, 4 * width, 8 * width],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            downsample_in_first_stage=False,
        )
        self.net = ResNetForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """(items, 1, 28, 28) -> (items, 10) logits."""
        return self.net(images).logits


class RowEncoder(nn.Module):
    """A transformer encoder that reads a digit as eight tokens, its rows."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(0.02 * torch.randn(8, width))
        block = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """(items, 64) -> (items, 10) logits."""
        tokens = self.embed(pixels.view(-1, 8, 8)) + self.position
        return self.head(self.encoder(tokens).mean(1))


class GPT(nn.Module):
    """A decoder-only transformer on characters: pre-norm, GELU, tied embedding."""

    def __init__(self, vocabulary: int, width: int = 64, layers: int = 3, context: int = 48):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:  # GPT-2's start, with its smaller one into the residual stream
                last = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if last else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(items, context) -> (items, context, vocabulary) logits."""
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embed.weight)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        items, length, width = x.shape
        split = self.attend(self.norm1(x)).view(items, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(items, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Characters(nn.Module):
    """A recurrent layer (LSTM or GRU) between an embedding and the next character's logits."""

    def __init__(self, layer: type[nn.RNNBase], vocabulary: int, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 32)
        self.recurrent = layer(32, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """(items, context) -> (items, context, vocabulary) logits."""
        hidden, _ = self.recurrent(self.embed(tokens))
        return self.head(hidden)


class MiniLM(nn.Module):
    """The first two layers of the pretrained MiniLM (15.6 M parameters) with a fresh classifier."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        from tasks.data import minilm_folder

        logging.set_verbosity_error()  # that the classifier is new is no news
        logging.disable_progress_bar()
        self.net = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_hidden_layers=2, num_labels=2
        )

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Token ids and mask, each (items, tokens) -> (items, 2) logits."""
        ids, mask = inputs
        return self.net(input_ids=ids, attention_mask=mask).logits
