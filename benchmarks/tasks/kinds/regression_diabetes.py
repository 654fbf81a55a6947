"""Regression on the 442 patients that scikit-learn carries: ten columns, progress after a year."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks import nets
from tasks.data import Table, split
from tasks.sources import Batch, Items
from tasks.task import Task


@functools.cache
def table() -> Table:
    """Columns and target of mean 0 and variance 1; 352 patients to train on."""
    from sklearn.datasets import load_diabetes

    columns, target = (torch.tensor(x, dtype=torch.float32) for x in load_diabetes(return_X_y=True))
    target = (target - target.mean()) / target.std()
    return split((columns / columns.std(0), target.unsqueeze(1)), 352)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


TASK = Task(
    "regression-diabetes",
    "regression",
    lambda: nets.mlp((10, 64, 64, 1), nn.Tanh),
    Items(table, full=352),
    loss,
    steps=300,
    nothing=1.0,
)
