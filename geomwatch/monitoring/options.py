"""The keyword options of a Monitor, which the adapters to hosts take and pass on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from geomwatch.controllers import Controller
from geomwatch.records import Alert
from geomwatch.rules import Rule
from geomwatch.sinks import Sink


class Options(TypedDict, total=False):
    """What `Monitor` takes beside model, loss_fn and optimizer; its docstring explains each."""

    every: int
    schedule: str
    max_overhead: float | None
    quantities: str | Sequence[str]
    probe_batch: Any
    mode: str
    operator: str
    micro_batch: int | None
    per_layer: bool
    hvp: str
    precision: str
    params: str | Sequence[str] | None
    also: Sequence[object]
    rules: Sequence[Rule] | None
    controllers: Sequence[Controller]
    dry_run: bool
    on_alert: Callable[[Alert], None] | None
    sinks: Sequence[Sink]
    seed: int


def is_disabled() -> bool:
    """Tell whether GEOMWATCH_DISABLE=1 in the environment turns everything off."""
    return os.environ.get("GEOMWATCH_DISABLE", "") not in ("", "0")
