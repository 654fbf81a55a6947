"""Results on disk: the arrays as .npz, all the rest beside them as .json."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.landscape.results import Result

FORMAT = 1
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in get_args(Result)}


def save(result: Result, path: str | Path) -> Path:
    """Write a result to <path>.npz and <path>.json; return the latter.

    The npz holds the arrays, the JSON what they are and where they come from; a float that is not
    finite is {"float": "nan"} there. Each is written whole or not at all, and the JSON knows the
    npz by its SHA-256.

    Raises:
        UsageError: (a TypeError too) it is no result.

    Example:
        >>> import numpy as np
        >>> import tempfile
        >>> from geomwatch.landscape.results import Slice
        >>> line = Slice(np.array([0.0, 1.0]), np.array([2.0, 3.0]), 2.0, "mine", 0, {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save(line, f"{folder}/line")
        ...     written.name, load(written).losses
        ('line.json', array([2., 3.]))
    """
    if type(result) not in _KINDS.values():
        raise UsageTypeError(
            f"result must be one of {', '.join(_KINDS)}, got {type(result).__name__}."
        )
    parts = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    arrays: dict[str, Any] = {
        name: value for name, value in parts.items() if isinstance(value, np.ndarray)
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    packed = buffer.getvalue()
    header = {
        "format": FORMAT,
        "kind": type(result).__name__,
        "arrays": {name: list(a.shape) for name, a in arrays.items()},
        "sha256": hashlib.sha256(packed).hexdigest(),
        **{name: value for name, value in parts.items() if name not in arrays},
    }
    text = json.dumps(_plain(header), indent=1, ensure_ascii=False, allow_nan=False)
    npz, described = _files(path)
    npz.parent.mkdir(parents=True, exist_ok=True)
    _write(npz, packed)
    _write(described, text.encode())
    return described


def load(path: str | Path) -> Result:
    """Read what `save` wrote, from its path with or without .json or .npz.

    Raises:
        UsageError: a file is missing, is no result, or the two do not belong together.

    Example: see `save`.
    """
    npz, described = _files(path)
    for file in (npz, described):
        if not file.is_file():
            raise UsageError(f"path must name a saved result, got {path}: {file} is missing.")
    packed = npz.read_bytes()
    try:
        header = json.loads(described.read_text(encoding="utf-8"))
        kind, wanted = _KINDS[header.pop("kind")], header.pop("sha256")
        version = header.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UsageError(f"path must name a saved result, got {described}: {error!r}.") from error
    if version != FORMAT:
        raise UsageError(f"{described} must have format {FORMAT}, got {version!r}.")
    if hashlib.sha256(packed).hexdigest() != wanted:
        raise UsageError(f"{npz} must be the file that {described.name} was written with, is not.")
    with np.load(io.BytesIO(packed), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in header.pop("arrays")}
    return kind(**{k: _unplain(v) for k, v in header.items()}, **arrays)  # type: ignore[no-any-return]


def _files(path: str | Path) -> tuple[Path, Path]:
    stem = Path(path)
    if stem.suffix in (".npz", ".json"):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + ".npz"), stem.with_name(stem.name + ".json")


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # as open() would have it: mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(float(value))}
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _unplain(value: Any) -> Any:
    if isinstance(value, dict):
        plain = {k: _unplain(v) for k, v in value.items()}
        return float(value["float"]) if value.keys() == {"float"} else plain
    if isinstance(value, list):
        return tuple(_unplain(v) for v in value)
    return value
