"""Between two trainings of one net: the barrier, as it stands and with units aligned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from geomwatch import landscape
from geomwatch.landscape import Barrier
from studies.cases import Case
from studies.nets import Encoder
from studies.settings import Settings
from studies.store import Store
from studies.training import loss_fn, state_name


def pairs(settings: Settings) -> list[tuple[int, int]]:
    """Each seed with the next, in a ring."""
    seeds = settings.seeds
    ring = list(zip(seeds, seeds[1:] + seeds[:1], strict=True))
    return ring if len(seeds) > 2 else ring[:1]


def connect(
    store: Store, case: Case, pair: tuple[int, int], stage: str, settings: Settings
) -> dict[str, Any]:
    """Measure the barrier between two seeds at one stage, in eval mode.

    BatchNorm's statistics are taken anew at each point. At the end of the plain nets also with the
    units of the second one permuted to lie where those of the first are; of the Transformer those
    of its linear layers alone.
    """
    straight = between(store, case, pair, stage, settings)
    found = {"straight": facts(straight)}
    if stage == "end" and not case.variant:
        found["aligned"] = facts(between(store, case, pair, stage, settings, align=True))
    return found


def between(
    store: Store,
    case: Case,
    pair: tuple[int, int],
    stage: str,
    settings: Settings,
    *,
    align: bool = False,
) -> Barrier:
    """Return the barrier between two seeds."""
    model = case.build(pair[0], settings)
    a, b = (store.state(state_name(case, seed, stage)) for seed in pair)
    here = align and not isinstance(model, Encoder)  # whose attention can't be traced
    if align and not here:
        b = dict(landscape.align(model, a, b, units=model.units()).state)
    batches = [case.data(settings).first(settings.items)]
    found = landscape.barrier(model, a, b, loss_fn, batches, points=settings.points, align=here)
    return replace(found, aligned=align)


def facts(found: Barrier) -> dict[str, Any]:
    """Return what a barrier amounts to."""
    return {
        "max_loss": found.max_loss,
        "height": found.height,
        "argmax": found.argmax_height,
        "loss_a": found.loss_a,
        "loss_b": found.loss_b,
        "nonfinite": found.nonfinite,
    }
