"""Small problems with known answers, shared by the tests."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import geomwatch

cross_entropy = geomwatch.supervised(F.cross_entropy)


def digits(count: int = 512, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The first `count` of scikit-learn's real 8x8 digits and their labels."""
    inputs, targets = load_digits(return_X_y=True)
    return (
        torch.tensor(inputs[:count] / 16, dtype=dtype),
        torch.tensor(targets[:count], dtype=torch.long),
    )


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """A fully connected net with the given layer widths."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


class Quadratic(nn.Module):
    """L(w) = w'Aw / 2 for a matrix A that we chose, so that its Hessian is known."""

    def __init__(self, matrix: Tensor, start: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.w = nn.Parameter(torch.ones(len(matrix), dtype=matrix.dtype))
        if start is not None:
            self.w.data.copy_(start)

    def forward(self, scale: Tensor) -> Tensor:
        return scale.mean() * 0.5 * self.w @ self.matrix @ self.w


def quadratic_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def wishart(dim: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A random positive matrix with a spread spectrum."""
    rng = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    spread = torch.logspace(0, -2, dim, dtype=torch.float64)
    return ((factor * spread) @ factor.T / dim).to(dtype)


@dataclass
class Exact:
    """The dense Hessian of a loss in float64."""

    hessian: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(self.hessian).flip(0)


def dense_hessian(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian of the cross-entropy by torch.func in float64, independent of our HVPs."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    flat = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
    inputs, targets = batch[0].double(), batch[1]

    def loss(vector: Tensor) -> Tensor:
        pieces = [v.view(s) for v, s in zip(vector.split(sizes), shapes, strict=True)]
        weights = dict(zip(names, pieces, strict=True))
        return F.cross_entropy(torch.func.functional_call(model, weights, (inputs,)), targets)

    return torch.func.hessian(loss)(flat)
