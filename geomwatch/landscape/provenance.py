"""Where a landscape comes from, and whether its loss is a function of the weights at all."""

from __future__ import annotations

import datetime
import hashlib
import math
import platform
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.records import VERSION

_ROUNDINGS = 8 * torch.finfo(torch.float32).eps  # by which two evaluations of one loss may differ


def provenance(model: nn.Module, loss_fn: object) -> dict[str, Any]:
    """Return versions, date, what was evaluated and at which weights."""
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
    }


def weights_digest(model: nn.Module) -> str:
    """Return a digest of the parameters, by which two results tell that they share their centre."""
    return digest(p for _, p in sorted(model.named_parameters()))


def state_digest(state: Mapping[str, Any]) -> str:
    """Return a digest of the tensors of a state."""
    return digest(t for _, t in sorted(state.items()) if isinstance(t, Tensor))


def digest(tensors: Iterable[Tensor]) -> str:
    """Return 16 hex digits of the SHA-256 of tensors' values, their dtypes and shapes."""
    total = hashlib.sha256()
    for t in tensors:
        values = t.detach().resolve_conj().resolve_neg().cpu().contiguous()
        total.update(f"{values.dtype}{tuple(values.shape)}".encode())
        total.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]


def steadiness(loss: Callable[[], float]) -> tuple[float, dict[str, Any]]:
    """Evaluate the loss twice at one point; return it, and whether and by how much it changes.

    A generator of its own, or other data at each call, makes a landscape a matter of chance: what
    differs by less than `repeat_difference` is then no geometry.
    """
    first, again = loss(), loss()
    return first, {"deterministic": same(first, again), "repeat_difference": abs(again - first)}


def same(a: float, b: float, tolerance: float = _ROUNDINGS) -> bool:
    """Tell whether two losses are one but for rounding; two that are not finite are."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= tolerance * max(abs(a), abs(b))
