"""Models written in plain torch, in all the ways that are known to trouble a second derivative."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_case import Case

VOCABULARY = 11


class ConvNet(nn.Module):
    """BatchNorm, activations in place and max-pooling, on 8 x 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.SiLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(0.1),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.view(-1, 8, 8)))


class Recurrent(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(8, 10, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.view(-1, 8, 8))[0][:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoder with the fused attention, over the rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x.view(-1, 8, 8)).mean(1))


class LanguageModel(nn.Module):
    """Predicts a class from tokens; the output layer can be the embedding."""

    def __init__(self, *, tied: bool = False, **embedding: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6, **embedding)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(tokens).tanh().mean(1))))


class Checkpointed(nn.Module):
    """Both layers are recomputed in the backward pass, with their dropout."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(64, 12), nn.Dropout(0.2), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.2), nn.ReLU())
        self.head = nn.Linear(12, 10)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        # A reentrant checkpoint wants an input that requires its gradient.
        return self.head(self.run(self.second, self.run(self.first, x.requires_grad_())))


class Smooth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 12), nn.LayerNorm(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.norm(self.first(x))))


def compiled() -> nn.Module:
    return torch.compile(Smooth(), backend="aot_eager")


def compiled_in_place() -> nn.Module:
    model = Smooth()
    model.compile(backend="aot_eager")
    return model


def part_of_a_model(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(make(), nn.Dropout(0.1), nn.Linear(10, 10))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(Smooth())


@functools.partial(torch.compile, backend="aot_eager")
def compiled_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def frozen() -> nn.Module:
    model = mlp(64, 16, 12, 10)
    model[0].requires_grad_(False)
    return model


def only_the_embedding(sparse: bool = True) -> nn.Module:
    """Trained, the rest frozen: SparseAdam takes sparse gradients only."""
    model = LanguageModel(sparse=sparse)
    model.hidden.requires_grad_(False)
    model.head.requires_grad_(False)
    return model


def sentences() -> tuple[Tensor, Tensor]:
    return torch.randint(0, VOCABULARY, (8, 5)), torch.randint(0, VOCABULARY, (8,))


def some_digits() -> tuple[Tensor, Tensor]:
    return digits(24)


def supervised(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(make, some_digits, **{"loss_fn": cross_entropy, **options})


def reading(make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(make, sentences, cross_entropy, **options)


def plain(run: Callable[..., Tensor], *inputs: Any) -> Tensor:
    return run(*inputs)


def with_momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


COMPILED = "aot_autograd does not currently support double backward|with non-empty donated buffers"
CASES = {
    "MLP": supervised(lambda: mlp(64, 16, 12, 10), optimizer=with_momentum),
    "ConvNet with BatchNorm": supervised(ConvNet),
    "LSTM": supervised(lambda: Recurrent(nn.LSTM)),
    "GRU": supervised(lambda: Recurrent(nn.GRU)),
    "TransformerEncoder": supervised(
        Encoder, obstacle="flash_attention_for_cpu_backward is not implemented"
    ),
    "tied embedding": reading(lambda: LanguageModel(tied=True)),
    "frozen layer": supervised(frozen),
    "sparse embedding by SGD": reading(
        lambda: LanguageModel(sparse=True),
        twin=LanguageModel,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    ),
    "sparse embedding by SparseAdam": reading(
        only_the_embedding, twin=lambda: only_the_embedding(False), optimizer=torch.optim.SparseAdam
    ),
    "checkpoints": supervised(
        lambda: Checkpointed(functools.partial(checkpoint, use_reentrant=False)),
        twin=lambda: Checkpointed(plain),
    ),
    "reentrant checkpoints": supervised(
        lambda: Checkpointed(functools.partial(checkpoint, use_reentrant=True)),
        twin=lambda: Checkpointed(plain),
        silent=True,  # it finds no gradients in the checkpoints
    ),
    "part of a model compiled": supervised(
        lambda: part_of_a_model(compiled), twin=lambda: part_of_a_model(Smooth), obstacle=COMPILED
    ),
    "torch.compile(model)": supervised(compiled, twin=Smooth, obstacle=COMPILED),
    "model.compile()": supervised(compiled_in_place, twin=Smooth, obstacle=COMPILED),
    "compiled loss function": supervised(
        Smooth,
        loss_fn=compiled_loss,
        twin_loss=cross_entropy,
        obstacle=COMPILED,
    ),
    # It keeps its parameters to itself, so that double backward is checked in float32.
    "TorchScript": supervised(scripted, twin=Smooth, validation_error=1e-3),
}
