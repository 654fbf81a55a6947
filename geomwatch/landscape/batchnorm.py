"""BatchNorm statistics that belong to the weights they are used with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def with_statistics(model: nn.Module) -> list[_NormBase]:
    """Return the normalisation layers whose running statistics an evaluation uses.

    Without those that a training model holds in eval mode: there they are part of the function.
    """
    held = {id(m) for m in model.modules() if model.training and not m.training}
    return [
        m
        for m in model.modules()
        if isinstance(m, _NormBase) and m.running_mean is not None and id(m) not in held
    ]


def recalibrate(norms: Sequence[_NormBase], forward_all: Callable[[], None]) -> None:
    """Set running statistics to the mean over the batches of what they are at these weights.

    At weights between those of two nets the statistics of either are wrong, so wrong that most of
    a barrier can be made of it (Izmailov et al. 2018; Jordan et al. 2023). One forward pass, in
    which these layers alone are in train mode. The caller puts everything back.
    """
    before = [(m, m.momentum, m.training) for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain mean, instead of one that forgets
        m.training = True
    with torch.no_grad():
        forward_all()
    for m, momentum, training in before:
        m.momentum, m.training = momentum, training
