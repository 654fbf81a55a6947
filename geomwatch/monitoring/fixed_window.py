"""The fixed batches that a run may be measured on."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from geomwatch.errors import UsageError
from geomwatch.isolation.random_state import RandomState


def fixed_window(source: Any) -> list[Any]:
    """Return the batches to average over: all of a DataLoader's, or the one batch; none for None.

    A loader is read once, and the random generators it draws from are put back.

    Raises:
        UsageError: the loader has no batches.
    """
    if source is None:
        return []
    if not isinstance(source, DataLoader):
        return [source]
    before = RandomState()
    try:
        window = list(source)
    finally:
        before.restore()
    if not window:
        raise UsageError("batch must hold data, got a DataLoader without batches.")
    return window
