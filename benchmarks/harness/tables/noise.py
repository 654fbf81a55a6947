"""What the batches of the first step say of a run, at the largest rate that it is headed for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from harness.scoring import failed, healthy
from harness.story import Story
from harness.tables.writing import Sets, Stories, table

_TUNED = 1.01  # times the tuned rate


def batch_noise(sets: Sets) -> str:
    """Show N(0) peak / lr(0) of runs that train and runs that fail; jumps are left out."""
    rows = []
    for adaptive in (False, True):
        some = sets.only(adaptive=adaptive, scenarios=("steady", "start", "ramp"))
        for name, stories in (("chosen on", some.development), ("held back", some.validation)):
            for what, own in _groups(stories):
                found = sorted(n for s in own if (n := forecast_noise(s)) is not None)
                family = "Adam family" if adaptive else "SGD"
                rows.append((family, name, what, len(found), *_spread(found)))
    header = ("optimizer", "set", "runs", "number", "smallest", "median", "largest")
    return table(header, rows)


def forecast_noise(story: Story) -> float | None:
    """Return the noise part of the stochastic margin at step 0, times the growth of the rate."""
    first = story.data["records"][0] if story.data["records"] else None
    if first is None or first["step"] > 0:
        return None
    whole, margin = (first["estimates"].get(f"{n}_margin") for n in ("stochastic", "stability"))
    if not whole or not margin or whole["value"] is None or not margin["value"]:
        return None
    recipe = story.run.recipe
    growth = max(recipe.rate / max(first["lr"]), 1.0)
    return growth * max(whole["value"] - margin["value"], 0.0)


def _groups(stories: Stories) -> Iterator[tuple[str, Stories]]:
    well = healthy(stories)
    yield "train, up to the tuned rate", [s for s in well if s.run.multiple <= _TUNED]
    yield "train, above it", [s for s in well if s.run.multiple > _TUNED]
    yield "fail", failed(stories, "start", "ramp")


def _spread(found: list[float]) -> tuple[str, ...]:
    if not found:
        return ("-", "-", "-")
    return tuple(f"{x:.2g}" for x in (found[0], float(np.median(found)), found[-1]))
