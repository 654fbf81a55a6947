"""Outcomes on disk: one JSON file for each run and policy, valid for its settings only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from side_by_side import code

from rescuing.grid import Run

VERSION = 1  # of what a file holds; raise it when a run has to be done again for it
Job = tuple[Run, str]  # a run and a policy


class Store:
    """A folder of outcomes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, job: Job, outcome: dict[str, Any]) -> None:
        """Write an outcome; a file is there whole or not at all."""
        path = self._path(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        head = {"settings": fingerprint(job), "code": code()}
        partial.write_text(json.dumps(head | outcome), encoding="utf-8")
        partial.replace(path)

    def load(self, job: Job) -> dict[str, Any] | None:
        """Read an outcome, or return None when it is missing, damaged, or of other settings."""
        try:
            found: dict[str, Any] = json.loads(self._path(job).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found if found.get("settings") == fingerprint(job) else None

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """List what has not been done."""
        return [job for job in jobs if self.load(job) is None]

    def _path(self, job: Job) -> Path:
        run, policy = job
        return self.folder / policy.replace(":", "_") / f"{run.name}.json"


def fingerprint(job: Job) -> str:
    """Return a hash of all that decides what a run does, except the code of geomwatch."""
    run, policy = job
    settings = {"version": VERSION, "run": asdict(run), "rate": run.rate, "policy": policy}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
