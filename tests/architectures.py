"""Random small architectures for property tests, as hypothesis strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

import geomwatch

INPUTS, CLASSES, ITEMS = 6, 3, 8


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.up(x))


class Attention(nn.Module):
    """Each feature is a token, each item a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(width, 2))
        self.attend = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[..., None] * self.embed
        return x + self.attend(tokens, tokens, tokens, need_weights=False)[0].sum(-1)


class Recurrence(nn.Module):
    """Reads the features one after another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell = nn.GRU(1, 2, batch_first=True)
        self.out = nn.Linear(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.cell(x[..., None])[1][0])


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda width: nn.Linear(width, width),
    "tanh": lambda width: nn.Tanh(),
    "relu": lambda width: nn.ReLU(),
    "gelu": lambda width: nn.GELU(),
    "prelu": lambda width: nn.PReLU(),
    "softmax": lambda width: nn.Softmax(-1),
    "layer norm": nn.LayerNorm,
    "batch norm": lambda width: nn.BatchNorm1d(width, track_running_stats=False),
    "dropout": lambda width: nn.Dropout(0.3),
    "residual": Residual,
    "gated": Gated,
    "attention": Attention,
    "recurrence": Recurrence,
}
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "label smoothing": lambda outputs, y: F.cross_entropy(outputs, y, label_smoothing=0.1),
    "squares": lambda outputs, y: F.mse_loss(outputs, F.one_hot(y, CLASSES).to(outputs)),
    "penalty": lambda outputs, y: F.cross_entropy(outputs, y) + 0.1 * outputs.square().mean(),
}


class Net(nn.Module):
    """Layers that are run in one order and may be registered in another."""

    def __init__(self, layers: Sequence[nn.Module], order: Sequence[int]) -> None:
        super().__init__()
        for index in order:
            self.add_module(f"layer{index}", layers[index])
        self.depth = len(layers)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.depth):
            x = getattr(self, f"layer{index}")(x)
        return x


@dataclass(frozen=True)
class Architecture:
    """What a random net is made of."""

    width: int
    kinds: tuple[str, ...]
    criterion: str
    seed: int

    @property
    def depth(self) -> int:
        return len(self.kinds) + 2

    @property
    def loss_fn(self) -> Any:
        return geomwatch.supervised(CRITERIA[self.criterion])

    def build(self, order: Sequence[int] | None = None) -> nn.Module:
        """The net in float64, its layers registered in `order`; the same weights each time."""
        torch.manual_seed(self.seed)
        inner = [LAYERS[kind](self.width) for kind in self.kinds]
        layers = [nn.Linear(INPUTS, self.width), *inner, nn.Linear(self.width, CLASSES)]
        return Net(layers, order or range(self.depth)).double()

    def batch(self, items: int = ITEMS) -> tuple[Tensor, Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        inputs = torch.randn(items, INPUTS, generator=rng, dtype=torch.float64)
        return inputs, torch.randint(0, CLASSES, (items,), generator=rng)


architectures = st.builds(
    Architecture,
    width=st.integers(2, 4),
    kinds=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4).map(tuple),
    criterion=st.sampled_from(sorted(CRITERIA)),
    seed=st.integers(0, 10_000),
)
