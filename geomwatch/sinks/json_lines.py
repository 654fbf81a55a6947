"""A file of lines, each plain JSON: a missing or non-finite value is null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomwatch.sinks.lines import Line


class JsonLines:
    """Appends each line to a file as JSON. No file stays open: a crash loses nothing."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # wherever the program moves to

    def __call__(self, line: Line) -> None:
        """Append one line."""
        text = json.dumps(_plain(line), allow_nan=False, ensure_ascii=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
