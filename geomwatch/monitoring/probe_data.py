"""The data a monitor always probes on, where it is not the step's own."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from geomwatch.errors import UsageError
from geomwatch.isolation.snapshot import Snapshot


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
    before = Snapshot([])
    try:
        window = list(source)
    finally:
        before.restore()
    if not window:
        raise UsageError("probe_batch must hold data, got a DataLoader without batches.")
    return window
