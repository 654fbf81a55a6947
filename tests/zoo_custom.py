"""Losses whose double backward fails, or is wrong without a word."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from problems import cross_entropy, digits
from silent import OnceDifferentiable, RawContext
from torch import Tensor, nn
from zoo_case import Case
from zoo_torch import LanguageModel, sentences

FRAMES, CLASSES, LABELS = 6, 4, 2
# Two differences in float32 must agree to 0.2 %.
DIFFERENCES: dict[str, Any] = {"backend": "finite_difference", "float32": 2e-3, "float64": 1e-8}
SILENT: dict[str, Any] = {"silent": True, "validation": "double backward is off by"}
MARKED: dict[str, Any] = {"validation": "OnceDifferentiable in the loss has no second derivative"}


class Custom(nn.Module):
    """An MLP with one of the functions above as its first activation, and another as its second."""

    def __init__(self, first: Any, second: Any, width: int) -> None:
        super().__init__()
        widths = itertools.pairwise([64, width, width, 10])
        self.layers = nn.ModuleList([nn.Linear(*pair) for pair in widths])
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(self.layers[0](x))
        return self.layers[2](self.second(self.layers[1](hidden)))


class Prototypes(nn.Module):
    """Classifies by the distance from learned points."""

    def __init__(self, distance: Any) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(64, 6), nn.Tanh())
        self.points = nn.Parameter(torch.randn(10, 6))
        self.distance = distance

    def forward(self, x: Tensor) -> Tensor:
        return -self.distance(self.embed(x), self.points)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b).square().sum(-1).sqrt()


class Speech(nn.Module):
    """Reads classes off frames."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, frames: Tensor) -> Tensor:
        return self.layers(frames).log_softmax(-1)


def ctc(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    frames, labels = batch
    lengths = [torch.full((len(frames),), n) for n in (FRAMES, LABELS)]
    return F.ctc_loss(model(frames).transpose(0, 1), labels, *lengths, reduction="sum")


def ctc_written_out(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The definition: -log of the sum over all paths that collapse to the labels, 0 as blank."""
    frames, labels = batch
    paths = torch.cartesian_prod(*[torch.arange(CLASSES)] * FRAMES)  # (paths, frames)
    total = torch.zeros((), dtype=frames.dtype)
    for logits, wanted in zip(model(frames), labels, strict=True):
        fits = torch.tensor([collapsed(path) == wanted.tolist() for path in paths.tolist()])
        scores = logits[torch.arange(FRAMES), paths[fits]].sum(-1)
        total = total - scores.logsumexp(0)
    return total


def collapsed(path: list[int]) -> list[int]:
    """Without repeats, then without blanks."""
    return [c for c, before in zip(path, [0, *path], strict=False) if c not in (0, before)]


def speech() -> tuple[Tensor, Tensor]:
    return torch.randn(3, FRAMES, 5), torch.tensor([[1, 2], [3, 3], [2, 1]])


def some_digits() -> tuple[Tensor, Tensor]:
    return digits(24)


def smooth(function: Any, **options: Any) -> Case:
    return custom(function.apply, torch.tanh, 12, some_digits, **options)


def with_kinks(function: Any, **options: Any) -> Case:
    """So many that differences in float32 cross some of them."""
    batch = functools.partial(digits, 256)
    return custom(function.apply, torch.relu, 64, batch, dtype="float64", float32=1e-6, **options)


def custom(first: Any, second: Any, width: int, batch: Any, **options: Any) -> Case:
    return Case(
        functools.partial(Custom, first, second, width),
        batch,
        cross_entropy,
        twin=functools.partial(Custom, torch.tanh, second, width),
        **{**DIFFERENCES, **options},
    )


CASES = {
    "raw tensor on ctx": smooth(RawContext, **SILENT),
    "raw tensor on ctx, kinks": with_kinks(RawContext, **SILENT),
    "once_differentiable": smooth(OnceDifferentiable, silent=True, **MARKED),
    "once_differentiable, kinks": with_kinks(OnceDifferentiable, silent=True, **MARKED),
    "padding_idx": Case(
        functools.partial(LanguageModel, padding_idx=0),
        sentences,
        cross_entropy,
        twin=LanguageModel,
        silent=True,
    ),
    "CTC loss": Case(
        Speech,
        speech,
        ctc,
        twin_loss=ctc_written_out,
        obstacle="_ctc_loss_backward is not implemented",
        validation="_ctc_loss_backward is not implemented",
        **DIFFERENCES,
    ),
    "cdist": Case(
        functools.partial(Prototypes, torch.cdist),
        some_digits,
        cross_entropy,
        twin=functools.partial(Prototypes, distances),
        obstacle="_cdist_backward' is not implemented",
        validation="_cdist_backward' is not implemented",
        **DIFFERENCES,
    ),
}
