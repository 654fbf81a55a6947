"""Options of a Monitor refused where they are written, before a host has a model to watch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.monitoring.monitor import Monitor
from geomwatch.monitoring.options import Options
from geomwatch.quantities.measurement import check_how, refuse_options

_KNOWN = frozenset(Options.__annotations__)


def check_early(callback: str, options: Mapping[str, Any], loss_fn: Any = None) -> None:
    """Raise now what Monitor would raise at the start of training.

    Except about `params`, which need a model, and `batch`, which may be a DataLoader to read.

    Raises:
        UsageError: an option is unknown or can't work.
    """
    refuse_options(f"{callback}(", {k: v for k, v in options.items() if k not in _KNOWN})
    how = check_how(options.get("how"))
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(1))
    known: Any = {**options, "how": replace(how, params=None, batch=None)}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    Monitor(model, _no_loss if loss_fn is None else loss_fn, optimizer, **known)


def _no_loss(model: Any, batch: Any) -> Tensor:
    raise AssertionError("nothing is measured here")
