"""What several tests of isolation share: losses and nets that would show a trace of a probe."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable

import numpy as np
import torch
from problems import mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations

STEPS = 3


class Noise(nn.Module):
    """Draws from NumPy's and Python's global generators, as augmentations do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * np.random.normal() + 0.1 * random.random())


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(5, 6, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).mean(1)))


def noisy_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), Noise(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def old_style(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(norm(nn.Linear(5, 8)), nn.Tanh(), norm(nn.Linear(8, 3)))


def frozen() -> nn.Module:
    model = mlp(5, 8, 8, 3)
    model[2].requires_grad_(False)
    return model


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


@dataclasses.dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (9, 5)
    tokens: int = 0  # the vocabulary of a net that reads tokens

    def batch(self) -> tuple[Tensor, Tensor]:
        reads = torch.randint(0, self.tokens, self.shape) if self.tokens else None
        return torch.randn(self.shape) if reads is None else reads, torch.randint(0, 3, (9,))


NETS = {
    "BatchNorm, dropout and other generators": Net(noisy_mlp),
    "spectral norm by hooks": Net(lambda: old_style(nn.utils.spectral_norm)),
    "weight norm by hooks": Net(lambda: old_style(nn.utils.weight_norm)),
    "spectral norm": Net(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 3)))),
    "weight norm": Net(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 3)))),
    "LSTM": Net(lambda: Recurrent(nn.LSTM), (9, 4, 5)),
    "GRU": Net(lambda: Recurrent(nn.GRU), (9, 4, 5)),
    "TransformerEncoder": Net(Attentive, (9, 4, 8)),
    "tied embedding": Net(Tied, (9, 4), tokens=7),
    "frozen layer": Net(frozen),
    "convolution": Net(convolutional),
}
