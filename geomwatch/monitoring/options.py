"""The keyword options of a Monitor, which the adapters to hosts take and pass on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

from geomwatch.controllers.protocol import Controller
from geomwatch.monitoring.face import is_disabled as is_disabled
from geomwatch.quantities.measurement import Measurement
from geomwatch.records import Alert
from geomwatch.rules import Rule
from geomwatch.sinks import Sink


class Options(TypedDict, total=False):
    """What `Monitor` takes beside model, loss_fn and optimizer; its docstring explains each."""

    how: Measurement | None
    every: int | None
    budget: float | None
    rules: Sequence[Rule] | Rule | None
    controllers: Sequence[Controller] | Controller
    sinks: Sequence[Sink | str | Path] | Sink | str | Path
    on_alert: Callable[[Alert], None] | None
