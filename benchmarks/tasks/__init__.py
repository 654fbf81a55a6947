"""Real training tasks of every kind, small enough to train hundreds of them on a CPU.

`TASKS[name]` is a `Task`; `tuned(task, optimizer, batch)` the learning rates that suit it, found
once by `python benchmarks/tasks/calibrate.py` and kept in rates.json.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from tasks import data, nets
from tasks.data import DataMissingError
from tasks.sources import Items, Text
from tasks.task import Evaluation, Task

__all__ = ["TASKS", "DataMissingError", "Evaluation", "Task"]

_DIGITS, _MNIST = Items(data.digits), Items(data.mnist)
_CHARACTERS = 63

TASKS = {
    task.name: task
    for task in (
        Task("mlp-digits", "mlp", partial(nets.mlp, (64, 128, 64, 10)), _DIGITS, 10, 1500),
        Task(
            "mlp-mnist",
            "mlp",
            partial(nets.mlp, (784, 64, 64, 64, 64, 10), nn.Tanh),
            _MNIST,
            10,
            1500,
        ),
        Task("conv-mnist", "batch norm", nets.conv_batch_norm, _MNIST, 10, 600),
        Task("resnet-mnist", "batch norm", nets.ResNet18, _MNIST, 10, 400),
        Task("encoder-digits", "attention", nets.RowEncoder, _DIGITS, 10, 800),
        Task(
            "gpt-kjv",
            "attention",
            partial(nets.GPT, _CHARACTERS),
            Text(data.characters, context=48),
            _CHARACTERS,
            600,
            batch=16,
        ),
        Task(
            "lstm-kjv",
            "recurrent",
            partial(nets.CharacterLSTM, _CHARACTERS),
            Text(data.characters, context=48),
            _CHARACTERS,
            600,
            batch=16,
        ),
        Task("minilm-verses", "attention", nets.MiniLM, Items(data.verses), 2, 100, batch=16),
        # Full-batch gradient descent at the edge of stability (D = 2,410 and 25,450).
        Task(
            "gd-digits",
            "mlp",
            partial(nets.mlp, (64, 32, 10), nn.Tanh),
            Items(data.digits, full=400),
            10,
            800,
            squared_error=True,
        ),
        Task(
            "gd-mnist",
            "mlp",
            partial(nets.mlp, (784, 32, 10), nn.Tanh),
            Items(data.mnist, full=400),
            10,
            800,
            squared_error=True,
        ),
    )
}
