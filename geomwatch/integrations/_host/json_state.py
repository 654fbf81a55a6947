"""A monitor's state as JSON, for hosts whose checkpoints are text."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomwatch.errors import UsageError

_TENSOR = "tensor"


def to_json(state: Any) -> Any:
    """Return dicts, lists, tensors and primitives as what JSON knows; a tensor as its bytes."""
    if isinstance(state, Tensor):
        array = state.detach().cpu().numpy()
        text = base64.b64encode(array.tobytes()).decode("ascii")
        return {_TENSOR: text, "dtype": str(array.dtype), "shape": list(array.shape)}
    if isinstance(state, Mapping):
        return {str(key): to_json(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [to_json(value) for value in state]
    return state


def from_json(state: Any) -> Any:
    """Undo `to_json`; tuples come back as lists.

    Raises:
        UsageError: a tensor is damaged.
    """
    if isinstance(state, Mapping) and _TENSOR in state:
        try:
            array = np.frombuffer(base64.b64decode(state[_TENSOR]), dtype=state["dtype"])
            return torch.from_numpy(array.copy().reshape(state["shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"the state must hold tensors as geomwatch has saved them, got one with {error}."
            ) from error
    if isinstance(state, Mapping):
        return {key: from_json(value) for key, value in state.items()}
    if isinstance(state, list):
        return [from_json(value) for value in state]
    return state


def is_json(value: Any) -> bool:
    """Tell whether JSON can hold a value."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
