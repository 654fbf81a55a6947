"""All that a probe could disturb, copied and compared bit by bit."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import geomwatch


def rng_states() -> list[Any]:
    return [torch.get_rng_state(), list(np.random.get_state()), random.getstate()]


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors, arrays and scalars."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def near(a: Any, b: Any, rel: float) -> bool:
    """Equality of nested containers, but that floats may differ a little."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(near(a[key], b[key], rel) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(near(x, y, rel) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=rel)
    return same(a, b)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """All that a probe could disturb, copied."""
    state = {
        "weights and buffers": dict(model.state_dict()),
        "gradients": [p.grad for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "rng": rng_states(),
        "switches": [
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.cuda.flash_sdp_enabled(),
            geomwatch.is_probing(),
        ],
    }
    return copy.deepcopy(state)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    assert [key for key in a if not same(a[key], b[key])] == []
