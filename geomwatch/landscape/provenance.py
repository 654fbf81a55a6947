"""Where a landscape comes from: all that is needed to tell two of them apart."""

from __future__ import annotations

import datetime
import hashlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.records import VERSION


def provenance(model: nn.Module, loss_fn: object, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, date, what was evaluated and at which weights, and `facts` of the caller."""
    params = list(model.parameters())
    return {
        "geomwatch": VERSION,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in params),
        "device": str(params[0].device) if params else "cpu",
        "weights": weights_digest(model),
        "loss_fn": getattr(loss_fn, "__qualname__", type(loss_fn).__name__),
        **facts,
    }


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the parameters, by which two results tell that they share their centre."""
    return digest(p for _, p in sorted(model.named_parameters()))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return 16 hex digits of the SHA-256 of tensors' values, their dtypes and shapes."""
    total = hashlib.sha256()
    for t in tensors:
        values = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
        total.update(f"{values.dtype}{tuple(values.shape)}".encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
