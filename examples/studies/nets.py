"""The paper's three nets, small, each with the parts that the study takes away."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected, inputs - width - width - classes, with ReLUs.

    `skip` adds the input of the second hidden layer to its output, `norm` puts a LayerNorm behind
    each of the two.
    """

    def __init__(
        self, inputs: int, classes: int, width: int, *, skip: bool = False, norm: bool = False
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, classes)
        self.skip = skip

    def forward(self, images: Tensor) -> Tensor:
        """(items, 1, side, side) -> (items, classes) logits."""
        x = F.relu(self.norm1(self.first(images.flatten(1))))
        y = F.relu(self.norm2(self.second(x)))
        return self.head(x + y if self.skip else y)


class Block(nn.Module):
    """Two 3x3 convolutions and what goes past them (He et al. 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, skip: bool, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=not norm)
        self.norm1 = _batch_norm(outputs, norm=norm)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=not norm)
        self.norm2 = _batch_norm(outputs, norm=norm)
        self.skip = skip
        self.past: nn.Module = nn.Identity()
        if skip and (stride > 1 or inputs != outputs):
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=not norm)
            self.past = nn.Sequential(conv, _batch_norm(outputs, norm=norm))

    def forward(self, x: Tensor) -> Tensor:
        """(items, inputs, height, width) -> (items, outputs, height / stride, width / stride)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.past(x) if self.skip else y)


class ResNet18(nn.Module):
    """ResNet-18 of torchvision's shape, from one channel and `width` instead of 64 at the start.

    7x7 stem of stride 2, max pooling, four stages of two basic blocks, mean over places. Without
    `skip` it is the plain net of the same 17 layers; without `norm` convolutions have biases.
    """

    def __init__(self, classes: int, width: int, *, skip: bool = True, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 7, stride=2, padding=3, bias=not norm)
        self.norm = _batch_norm(width, norm=norm)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            stride = 1 if inputs == outputs else 2
            blocks.append(Block(inputs, outputs, stride, skip=skip, norm=norm))
            blocks.append(Block(outputs, outputs, 1, skip=skip, norm=norm))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(items, 1, side, side) -> (items, classes) logits."""
        x = self.pool(F.relu(self.norm(self.stem(images))))
        return self.head(self.blocks(x).mean((2, 3)))


class Layer(nn.Module):
    """Self-attention and two linear layers, normalised before each (pre-norm), with dropout."""

    def __init__(self, width: int, heads: int, dropout: float, *, skip: bool, norm: bool) -> None:
        super().__init__()
        self.heads, self.skip = heads, skip
        self.norm1 = nn.LayerNorm(width) if norm else nn.Identity()
        self.norm2 = nn.LayerNorm(width) if norm else nn.Identity()
        self.attend = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(items, tokens, width) -> the same shape."""
        x = self._past(x, self._attention(self.norm1(x)))
        return self._past(x, self.down(self.dropout(F.gelu(self.up(self.norm2(x))))))

    def _past(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.dropout(y)
        return x + y if self.skip else y

    def _attention(self, x: Tensor) -> Tensor:
        items, length, width = x.shape
        split = self.attend(x).view(items, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
        return self.project(mixed.transpose(1, 2).reshape(items, length, width))


class Encoder(nn.Module):
    """A Transformer encoder that classifies: two layers, the mean over tokens, a linear head.

    Reads images row by row (`vocabulary` None, `size` pixels a row) or words by their numbers.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        *,
        tokens: int,
        size: int = 0,
        vocabulary: int | None = None,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        skip: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.words = vocabulary is not None
        self.embed: nn.Module = (
            nn.Linear(size, width) if vocabulary is None else nn.Embedding(vocabulary, width)
        )
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.Sequential(
            *(Layer(width, heads, dropout, skip=skip, norm=norm) for _ in range(layers))
        )
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """(items, 1, side, side) images or (items, tokens) words -> (items, classes) logits."""
        tokens = inputs if self.words else inputs.squeeze(1)
        x = self.embed(tokens) + self.position
        return self.head(self.norm(self.layers(x)).mean(1))

    def units(self) -> dict[str, list[tuple[str, int]]]:
        """The hidden units of the linear layers, which may change places; heads and tokens stay."""
        found = {}
        for i in range(len(self.layers)):
            name = f"layers.{i}"
            axes = [(f"{name}.up.weight", 0), (f"{name}.up.bias", 0), (f"{name}.down.weight", 1)]
            found[f"units {i + 1}"] = axes
        return found


def _batch_norm(channels: int, *, norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if norm else nn.Identity()
