"""Options of a test, as one flat dict: those of a Measurement are gathered in `how`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomwatch import Measurement
from geomwatch.quantities.measurement import OPTIONS


def faced(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments that Monitor, measure and doctor take."""
    how = {name: value for name, value in options.items() if name in OPTIONS}
    rest = {name: value for name, value in options.items() if name not in OPTIONS}
    return rest | ({"how": Measurement(**how)} if how else {})
