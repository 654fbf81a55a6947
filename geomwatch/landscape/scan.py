"""Evaluate a loss at one point after another: resumable, with a bar, and known to be steady."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from geomwatch.errors import UsageError
from geomwatch.landscape.bar import Progress, reporter
from geomwatch.landscape.provenance import same, steadiness
from geomwatch.landscape.results import Facts, Floats

_TOLERANCE = 1e-6  # of the loss at the first point, between the call that began and this one

Point = TypeVar("Point")


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """The losses at all points, and that at the reference point."""

    losses: Floats  # (points,)
    loss: float
    provenance: Facts

    @property
    def nonfinite(self) -> int:
        """How many of the losses are not finite."""
        return int((~np.isfinite(self.losses)).sum())


def scan(
    loss: Callable[[Point], float],
    points: Sequence[Point],
    *,
    reference: Point,
    header: Facts,
    resume: str | Path | None = None,
    progress: Progress = False,
) -> Scan:
    """Evaluate the loss at each point, and twice at the reference, to see whether it is steady.

    Args:
        header: what is computed, beginning with its "kind"; a `resume` file of anything else is
            refused.
    """
    start = time.perf_counter()
    first, steady = steadiness(lambda: loss(reference))
    facts = {**header, "deterministic": steady["deterministic"]}
    partial = Partial(resume, facts, first)
    report = reporter(progress, str(header["kind"]))
    report(len(partial.known), len(points))
    for index, point in enumerate(points):
        if index not in partial.known:
            partial.add(index, loss(point))
            report(len(partial.known), len(points))
    losses = np.array([partial.known[i] for i in range(len(points))], dtype=np.float64)
    spent = {"seconds": round(time.perf_counter() - start, 3)}
    return Scan(losses, first, {**facts, **steady, **spent})


class Partial:
    """The points of one computation, in a file of JSON lines: what it is, then [index, loss].

    Kept as they are evaluated, so that an interrupted computation goes on. A line that was cut
    short by a crash is left out. Without a path nothing is kept.
    """

    def __init__(self, path: str | Path | None, header: Facts, loss: float) -> None:
        self.known: dict[int, float] = {}
        self._path = None if path is None else Path(path).absolute()
        if self._path is None:
            return
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        own = json.dumps({**header, "loss": repr(loss)})
        whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if text:
            self._compare(_read(whole[0]) if whole else None, json.loads(own))
        self.known = {int(index): float(value) for index, value in map(json.loads, whole[1:])}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("".join(whole) or f"{own}\n", encoding="utf-8")

    def add(self, index: int, loss: float) -> None:
        """Keep one more point."""
        self.known[index] = loss
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([index, repr(loss)]) + "\n")

    def _compare(self, found: Mapping[str, Any] | None, own: Mapping[str, Any]) -> None:
        """Refuse a file of another computation."""
        if found is None:
            raise UsageError(
                f"resume must name a file that an earlier call has begun, or a new one, got "
                f"{self._path}, which is something else. Pass another path."
            )
        ours, theirs = float(own["loss"]), float(found["loss"])
        keys = [k for k in {**own, **found} if k != "loss" and own.get(k) != found.get(k)]
        alike = same(ours, theirs, _TOLERANCE) or not own["deterministic"]
        if not keys and not alike:
            keys = [f"loss at the first point, {theirs:.6g} in the file and {ours:.6g} now"]
        if keys:
            raise UsageError(
                f"resume must name a file of the same computation, got {self._path}, which "
                f"differs in: {', '.join(keys)}. Delete it, or pass another path."
            )


def _read(line: str) -> Mapping[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"kind", "loss"} <= found.keys() else None
