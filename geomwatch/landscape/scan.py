"""Evaluate the loss at one point after another: resumable, with a bar, and known to be steady."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from geomwatch.errors import UsageError
from geomwatch.landscape.bar import Progress, reporter
from geomwatch.landscape.evaluator import Evaluator, Place, same
from geomwatch.landscape.partial import Partial
from geomwatch.landscape.results import Floats

Loss = Callable[[Place], float]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a landscape is evaluated; the options that all functions share."""

    mode: str = "train"
    also: nn.Module | Sequence[object] = ()
    precision: str = "float32"
    resume: str | Path | None = None
    progress: Progress = False

    def of_evaluator(self) -> dict[str, Any]:
        """Return the options of `evaluating`."""
        return {"mode": self.mode, "also": self.also, "precision": self.precision}


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """The losses at all points, and that at the reference point."""

    losses: Floats  # (points,)
    loss: float
    provenance: Mapping[str, Any]

    @property
    def nonfinite(self) -> int:
        """How many of the losses are not finite."""
        return int((~np.isfinite(self.losses)).sum())


def scan(
    evaluator: Evaluator,
    places: Sequence[Place],
    *,
    reference: Place,
    header: Mapping[str, Any],
    setting: Setting,
    loss: Loss | None = None,
) -> Scan:
    """Evaluate the loss at each place, and twice at the reference, to see whether it is steady.

    A loss that gives another value at the same point is marked `deterministic: False`, with the
    `repeat_difference`: what differs by less than that is no geometry.
    """
    loss = loss or evaluator.loss
    start = time.perf_counter()
    first, again = loss(reference), loss(reference)
    deterministic = same(first, again)
    facts = {**header, "deterministic": deterministic}
    partial = Partial(setting.resume, facts, first)
    report = reporter(setting.progress, str(header["kind"]))
    report(len(partial.known), len(places))
    for index, place in enumerate(places):
        if index not in partial.known:
            partial.add(index, loss(place))
            report(len(partial.known), len(places))
    losses = np.array([partial.known[i] for i in range(len(places))], dtype=np.float64)
    how = facts | {
        "repeat_difference": abs(again - first),
        "items": evaluator.items,
        "passes": evaluator.passes,
        "seconds": round(time.perf_counter() - start, 3),
        "precision": setting.precision,
        "dtype": str(evaluator.layout.params[0].dtype).removeprefix("torch."),
    }
    return Scan(losses, first, how)


def grid(name: str, given: object, default: Floats) -> Floats:
    """Return the points of an axis.

    Raises:
        UsageError: they are not two or more finite numbers in ascending order.
    """
    values = default if given is None else given
    try:
        points = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.array(np.nan)
    if points.ndim != 1 or len(points) < 2 or not (np.diff(points) > 0).all():
        raise UsageError(
            f"{name} must be two or more finite numbers in ascending order, got {values!r}. "
            "For example numpy.linspace(-1, 1, 41)."
        )
    return points
