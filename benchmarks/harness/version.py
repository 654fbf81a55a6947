"""Which version of geomwatch a run or a table was made with."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from pathlib import Path

import geomwatch

ROOT = Path(__file__).parents[2]


@functools.cache
def code() -> str:
    """Return a hash of geomwatch's sources; reports say when runs differ in it."""
    digest = hashlib.sha256()
    for path in sorted(Path(geomwatch.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@functools.cache
def commit() -> str:
    """Return the commit that is checked out, with a "+" if geomwatch differs from it."""
    try:
        found = _git("rev-parse", "--short=7", "HEAD").strip()
        return found + ("+" if _git("status", "--porcelain", "geomwatch") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def written_by(script: str) -> str:
    """Return the first line of a table: its script, and the commit it is run at."""
    return f"Written by `benchmarks/{script}` at commit {commit()}."


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
