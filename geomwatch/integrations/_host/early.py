"""Options of a Monitor refused where they are written, before a host has a model to watch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.errors import UsageTypeError
from geomwatch.monitoring.monitor import Monitor
from geomwatch.monitoring.options import Options

_LATER = ("params", "probe_batch")


def check_early(callback: str, options: Mapping[str, Any], loss_fn: Any = None) -> None:
    """Raise now what Monitor would raise at the start of training.

    Except about `params`, which need a model, and `probe_batch`, which may be a DataLoader to read.

    Raises:
        UsageError: an option is unknown or can't work.
    """
    unknown = sorted(set(options) - set(Options.__annotations__))
    if unknown:
        raise UsageTypeError(
            f"{callback} must be given options of Monitor, got {', '.join(unknown)}. It knows: "
            f"{', '.join(Options.__annotations__)}."
        )
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1))
    known: Any = {name: value for name, value in options.items() if name not in _LATER}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Monitor(model, _no_loss if loss_fn is None else loss_fn, optimizer, **known)


def _no_loss(model: Any, batch: Any) -> Tensor:
    raise AssertionError("nothing is measured here")
