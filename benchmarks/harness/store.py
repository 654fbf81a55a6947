"""Runs on disk: one compressed JSON file for each run and policy, valid for its settings only."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from harness.policies import named
from harness.run import Run
from harness.version import code, commit

VERSION = 2  # of what a file holds; raise it when a run has to be done again for it
Job = tuple[Run, str]  # a run and a policy


class Store:
    """A folder of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run, policy: str) -> Path:
        named = policy.replace("%", "pct").replace(":", "_")
        return self.folder / named / f"{run.name}.json.gz"

    def save(self, run: Run, policy: str, story: dict[str, Any]) -> None:
        """Write a run; a file is there whole or not at all."""
        path = self.path(run, policy)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "settings": fingerprint(run, policy),
            "code": code(),
            "commit": commit(),
            "torch": torch.__version__,
            "policy": policy,
            "options": named(policy).options,
            "run": {**asdict(run), "name": run.name, "scenario": run.scenario},
        }
        partial = path.with_suffix(".partial")
        partial.write_bytes(gzip.compress(json.dumps(head | story, default=str).encode(), mtime=0))
        partial.replace(path)

    def load(self, run: Run, policy: str) -> dict[str, Any] | None:
        """Read a run, or return None when it is missing, damaged, or of other settings."""
        text = self._text(run, policy)
        return None if text is None else json.loads(text)

    def has(self, run: Run, policy: str) -> bool:
        """Tell whether `load` would find a run."""
        return self._text(run, policy) is not None

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """List what has not been done."""
        return [job for job in jobs if not self.has(*job)]

    def _text(self, run: Run, policy: str) -> str | None:
        try:
            text = gzip.decompress(self.path(run, policy).read_bytes()).decode()
        except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):
            return None
        # The settings come first in the file: no need to parse megabytes to compare them.
        return text if text.startswith(f'{{"settings": "{fingerprint(run, policy)}"') else None


def fingerprint(run: Run, policy: str) -> str:
    """Return a hash of all that decides what a run does, except the code of geomwatch."""
    options = named(policy).options
    settings = {"version": VERSION, "run": asdict(run), "policy": policy, "options": options}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
