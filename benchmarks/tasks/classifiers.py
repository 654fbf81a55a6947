"""The first ten tasks: labels and next characters, on real data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from tasks import data, nets
from tasks.sources import Items, Source, Text
from tasks.task import Classification, Kind, squared_error

_DIGITS, _MNIST = Items(data.digits), Items(data.mnist)
_BIBLE, _CHARACTERS = Text(data.characters, context=48), 63


def _task(
    name: str,
    net: Callable[[], nn.Module],
    source: Source,
    steps: int,
    kind: Kind = "classification",
    **more: Any,
) -> Classification:
    return Classification(name, kind, net, source, steps=steps, **{"batch": 64} | more)


TASKS = (
    _task("mlp-digits", partial(nets.mlp, (64, 128, 64, 10)), _DIGITS, 1500),
    _task("mlp-mnist", partial(nets.mlp, (784, 64, 64, 64, 64, 10), nn.Tanh), _MNIST, 1500),
    _task("conv-mnist", nets.conv_batch_norm, _MNIST, 600),
    _task("resnet-mnist", nets.ResNet18, _MNIST, 400),
    _task("encoder-digits", nets.RowEncoder, _DIGITS, 800),
    _task(
        "gpt-kjv",
        partial(nets.GPT, _CHARACTERS),
        _BIBLE,
        600,
        "language model",
        classes=_CHARACTERS,
        batch=16,
    ),
    _task(
        "lstm-kjv",
        partial(nets.Characters, nn.LSTM, _CHARACTERS),
        _BIBLE,
        600,
        "language model",
        classes=_CHARACTERS,
        batch=16,
    ),
    _task(
        "minilm-verses", nets.MiniLM, Items(data.verses), 100, "fine-tuning", classes=2, batch=16
    ),
    # Full-batch gradient descent at the edge of stability (D = 2,410 and 25,450).
    _task(
        "gd-digits",
        partial(nets.mlp, (64, 32, 10), nn.Tanh),
        Items(data.digits, full=400),
        800,
        loss=squared_error,
    ),
    _task(
        "gd-mnist",
        partial(nets.mlp, (784, 32, 10), nn.Tanh),
        Items(data.mnist, full=400),
        800,
        loss=squared_error,
    ),
)
