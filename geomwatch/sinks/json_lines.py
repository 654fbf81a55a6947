"""A file of lines, each plain JSON: a missing or non-finite value is null."""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from torch import Tensor

from geomwatch.sinks.escapes import escaped
from geomwatch.sinks.lines import Line

_AS_THEY_ARE = (str, int, bool, type(None))


class JsonLines:
    """Appends each line to a file as JSON, at once and whole: a crash loses nothing.

    What a full disk or a kill has left unfinished stays alone on its line: the next one starts on
    its own. The file is made, with its folder, when there is a first line, and again where it has
    been moved or deleted since. Processes may share it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # wherever the program moves to
        self._file: FileIO | None = None

    def __call__(self, line: Line) -> None:
        """Append one line.

        Raises:
            OSError: it could not be written, or not all of it.
            TypeError: something in it is no number, text, list or dict.
        """
        text = json.dumps(_plain(line), allow_nan=False, ensure_ascii=False)
        raw = (escaped(text) + "\n").encode("utf-8")
        file = self._opened()
        left = memoryview(b"\n" + raw if _is_torn(file) else raw)
        while left:
            left = left[file.write(left) :]

    def close(self) -> None:
        """Close the file; a further line opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # of a half-made one, or at the end of the program
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"

    def _opened(self) -> FileIO:
        if self._file is not None and not _is_at(self._file, self.path):
            with contextlib.suppress(OSError):  # of what was deleted together with its disk
                self.close()
            self._file = None
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.path, "a+")
        return self._file


def _is_at(file: FileIO, path: Path) -> bool:
    """Tell whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _is_torn(file: FileIO) -> bool:
    """Tell whether a file ends in the middle of a line."""
    if not file.seekable() or file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return _plain(float(value))
    return value
