"""The landscapes that are drawn: one net of each kind at the end of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from geomwatch import landscape
from studies.cases import Case
from studies.connecting import between, pairs
from studies.settings import Settings
from studies.store import Store
from studies.training import loss_fn, restored

KINDS = ("slice", "plane", "straight", "aligned", "density")


def picture(store: Store, case: Case, kind: str, settings: Settings) -> landscape.Slice | Any:
    """Return one landscape of a case's first seed, computed once."""
    path = folder(store, case) / kind
    if not path.with_suffix(".json").exists():
        landscape.save(_compute(store, case, kind, settings), path)
    return landscape.load(path)


def folder(store: Store, case: Case) -> Path:
    """Return where the landscapes of a case are kept."""
    return store.folder / case.name / "pictures"


def _compute(store: Store, case: Case, kind: str, settings: Settings) -> Any:
    if kind in ("straight", "aligned"):
        pair = pairs(settings)[0]
        return between(store, case, pair, "end", settings, align=kind == "aligned")
    model = restored(store, case, settings.seeds[0], "end", settings)
    batches = [case.data(settings).first(settings.items)]
    if kind == "density":
        vectors, steps = settings.density_vectors, settings.density_steps
        return landscape.density(model, loss_fn, batches, vectors=vectors, steps=steps)
    v, u = (landscape.random_direction(model, seed=seed) for seed in (0, 1))
    if kind == "slice":
        alphas = np.linspace(-1, 1, 2 * settings.points - 1)
        return landscape.slice_1d(model, loss_fn, batches, v, alphas=alphas)
    resume = folder(store, case) / "plane.partial"
    return landscape.plane(
        model, loss_fn, batches, (v, u), alphas=np.linspace(-1, 1, settings.plane), resume=resume
    )
