"""What has been computed, piece by piece on disk, so that a study can be stopped and started."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from studies.settings import Settings


class Store:
    """Pieces by name: facts as JSON, states as npz. A folder for each choice of sizes.

    A piece is written whole or not at all. A change of the code does not make it stale: delete
    the folder then.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder / settings.digest

    def facts(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return plain data that were computed before, or compute and keep them."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            text = json.dumps(plain(compute()), indent=1, ensure_ascii=False, allow_nan=False)
            _write(path, text.encode())
        return json.loads(path.read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        """Whether facts of this name have been kept."""
        return (self.folder / f"{name}.json").exists()

    def keep_state(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Keep a model's state_dict."""
        path = self.folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.stem}.part.npz")
        np.savez(part, **{key: t.detach().cpu().numpy() for key, t in state.items()})
        os.replace(part, path)

    def state(self, name: str) -> dict[str, Tensor]:
        """Return a state_dict that has been kept."""
        with np.load(self.folder / f"{name}.npz") as stored:
            return {key: torch.from_numpy(stored[key]) for key in stored.files}


def plain(value: Any) -> Any:
    """Return plain JSON: numbers that are not finite become None, arrays lists."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
