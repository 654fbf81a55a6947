"""Two ways to be deceived: power iteration without deflation, and a loss that changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch import Measurement, landscape
from geomwatch.curvature.objective import LossFn, Objective
from geomwatch.vectors.layout import generator
from studies.cases import Case
from studies.data import Batch
from studies.measuring import shapes
from studies.settings import Settings
from studies.store import Store
from studies.training import loss_fn, restored

_STREAM = 10_000  # of seeds for dropout, away from those of trainings


def repeated_eigenvalue(store: Store, case: Case, settings: Settings) -> dict[str, Any]:
    """Look for the largest eigenvalues of a trained net in three ways, by as many HVPs each.

    Power iteration from another start each time finds the one of largest size each time; with
    deflation (what has been found is projected out) it goes on to the next; Lanczos has all of
    them at once, with residuals.
    """
    model = restored(store, case, settings.seeds[0], "end", settings)
    batch = case.data(settings).first(settings.items)
    count, steps = settings.power_starts, settings.power_steps
    with Objective(model, loss_fn, [batch]) as objective:
        starts = [objective.layout.normal(generator(seed)) for seed in range(count)]
        plain = [power(objective.hvp, start, steps)[0] for start in starts]
        deflated: list[float] = []
        known = torch.empty(0, objective.layout.dim)
        for start in starts:
            value, vector = power(objective.hvp, start, steps, known)
            deflated.append(value)
            known = torch.cat([known, vector[None]])
    exact = landscape.hessian_directions(
        model, loss_fn, [batch], k=count, max_hvps=max(steps, count)
    )
    return {
        "without_deflation": plain,
        "with_deflation": deflated,
        "lanczos": [v.facts["eigenvalue"] for v in exact],
        "residuals": [v.facts["residual"] for v in exact],
        "hvps": {"power": count * steps, "lanczos": exact[0].facts["hvps"]},
    }


def power(
    operator: Callable[[Tensor], Tensor], start: Tensor, steps: int, known: Tensor | None = None
) -> tuple[float, Tensor]:
    """Return Rayleigh quotient and unit vector of power iteration, away from the known vectors."""

    def outside(v: Tensor) -> Tensor:
        v = v if known is None else v - known.T @ (known @ v)
        return v / v.norm()

    v, value = outside(start), 0.0
    for _ in range(steps):
        hv = operator(v)
        value, v = float(v @ hv), outside(hv)
    return value, v


def false_ruggedness(store: Store, case: Case, settings: Settings) -> dict[str, Any]:
    """Slice a trained net along the same directions with a steady loss, and with one that changes.

    `off`: eval mode. Of nets with dropout, `replayed`: one mask for all points; `redrawn`: another
    one at each point, as in a model that is left in train mode. Of the others, `batches`: another
    mini-batch at each point.
    """
    model = restored(store, case, settings.seeds[0], "end", settings)
    data = case.data(settings)
    others = data.batches(_STREAM, settings.batch)
    ways: dict[str, tuple[str, LossFn]] = {"off": ("eval", loss_fn)}
    if any(isinstance(m, nn.Dropout) for m in model.modules()):
        ways |= {"replayed": ("train", loss_fn), "redrawn": ("train", _redrawn())}
    else:
        ways["batches"] = "eval", lambda net, _: loss_fn(net, next(others))
    batch = data.first(settings.items)
    return {
        f"{way}_{scale}": _look(model, batch, fn, mode, scale, settings)
        for way, (mode, fn) in ways.items()
        for scale in ("unit", "filter")
    }


def _look(
    model: nn.Module, batch: Batch, fn: LossFn, mode: str, scale: str, settings: Settings
) -> dict[str, Any]:
    lines = [
        landscape.slice_1d(
            model,
            fn,
            [batch],
            landscape.random_direction(model, scale=scale, seed=seed),
            Measurement(mode=mode),
            alphas=np.linspace(-1, 1, 2 * settings.points - 1),
        )
        for seed in range(settings.directions)
    ]
    means = {name: float(np.mean(v)) if v else None for name, v in shapes(lines).items()}
    return means | {
        "deterministic": all(line.provenance["deterministic"] for line in lines),
        "alphas": lines[0].alphas,
        "losses": lines[0].losses,
    }


def _redrawn() -> LossFn:
    """A loss that draws dropout's masks anew at each call, which a probe would replay."""
    seeds = itertools.count(_STREAM)

    def redrawn(model: nn.Module, batch: Batch) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(next(seeds))
            return loss_fn(model, batch)

    return redrawn
