"""The geometry of a net at one stage of its training."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

import geomwatch
from geomwatch import Measurement, landscape
from geomwatch.curvature.objective import Objective
from geomwatch.estimators.noise_floor import read_out
from geomwatch.estimators.normalized_sharpness import normalized_sharpness
from geomwatch.records import Estimate
from geomwatch.vectors.layout import generator
from studies.cases import Case
from studies.data import Batch
from studies.settings import Settings
from studies.store import Store
from studies.training import loss_fn, restored

_QUANTITIES = (
    "loss",
    "grad_norm",
    "lambda_max",
    "lambda_2",
    "lambda_3",
    "lambda_min",
    "spectral_gap",
    "trace",
    "trace_per_param",
    "effective_rank",
    "normalized_sharpness",
    "normalized_sharpness_linf",
)
_GAUSS_NEWTON = ("trace", "effective_rank")
_LOCAL = ("roughness", "roughness_residual")  # geomwatch's own, at |alpha| <= 0.05
_QUARTIC = 4
SMALL_BALL = 1e-3


def measure(store: Store, case: Case, seed: int, stage: str, settings: Settings) -> dict[str, Any]:
    """Measure everything on the first training items, in train mode.

    That is the loss as it is trained on: BatchNorm on the statistics of the batch, dropout one
    mask that is replayed. For the nets as the paper has them also in eval mode, as it may have
    done, and more eigenvalues.
    """
    model = restored(store, case, seed, stage, settings)
    batch = case.data(settings).first(settings.items)
    share = settings.fewer if case.variant else 1.0
    budget = {
        "max_hvps": max(4, round(share * settings.lanczos)),
        "samples": max(3, round(share * settings.samples)),
    }
    names = _QUANTITIES if case.variant else _QUANTITIES + _LOCAL
    record = geomwatch.measure(
        model, loss_fn, batch, how=Measurement(quantities=names, seed=seed), **budget
    )
    found = {name: facts(e) for name, e in record.estimates.items()}
    few = budget | {"max_hvps": 3}  # it has no negative eigenvalues to look for
    how = Measurement(operator="ggn", quantities=_GAUSS_NEWTON, seed=seed)
    gauss_newton = geomwatch.measure(model, loss_fn, batch, how=how, **few)
    found |= {f"ggn_{name}": facts(e) for name, e in gauss_newton.estimates.items()}
    found |= _along_random_directions(model, batch, settings, "train", "filter")
    if not case.variant:
        found |= _eigenvalues(model, batch, settings, seed)
        found |= _in_eval_mode(model, batch, settings, seed)
        found |= _in_smaller_ball(model, batch, seed)
        for mode, scale in (("train", "unit"), ("eval", "filter"), ("eval", "unit")):
            found |= _along_random_directions(model, batch, settings, mode, scale)
    return found


def facts(estimate: Estimate) -> dict[str, Any]:
    """Return value and error of an estimate, or why it has none."""
    if estimate.value is None:
        return {"value": None, "reason": estimate.reason}
    return {"value": estimate.value, "error": estimate.error}


def _eigenvalues(
    model: nn.Module, batch: Batch, settings: Settings, seed: int
) -> dict[str, dict[str, Any]]:
    found = landscape.hessian_directions(
        model,
        loss_fn,
        [batch],
        Measurement(seed=seed),
        k=settings.eigenvalues,
        max_hvps=max(settings.lanczos, settings.eigenvalues),
    )
    return {
        f"eigenvalue_{i}": {"value": v.facts["eigenvalue"], "error": v.facts["residual"]}
        for i, v in enumerate(found, 1)
    }


def _in_eval_mode(
    model: nn.Module, batch: Batch, settings: Settings, seed: int
) -> dict[str, dict[str, Any]]:
    record = geomwatch.measure(
        model,
        loss_fn,
        batch,
        how=Measurement(
            quantities=["loss", "lambda_max", "lambda_2", "trace"], mode="eval", seed=seed
        ),
        max_hvps=settings.lanczos // 2,
        samples=max(3, settings.samples // 2),
    )
    return {f"eval_{name}": facts(e) for name, e in record.estimates.items()}


def _in_smaller_ball(model: nn.Module, batch: Batch, seed: int) -> dict[str, dict[str, Any]]:
    """The paper's normalized sharpness at a tenth of the radius, which it does not give."""
    with Objective(model, loss_fn, [batch]) as objective:
        rng = generator(seed)
        readout = read_out(objective.loss_at, objective.layout, rng=rng)
        small = normalized_sharpness(objective, readout, rng=rng, eps=SMALL_BALL)
    return {"normalized_sharpness_small": facts(small)}


def _along_random_directions(
    model: nn.Module, batch: Batch, settings: Settings, mode: str, scale: str
) -> dict[str, Any]:
    lines = [
        landscape.slice_1d(
            model,
            loss_fn,
            [batch],
            landscape.random_direction(model, scale=scale, seed=seed),
            Measurement(mode=mode),
            alphas=np.linspace(-1, 1, settings.points),
        )
        for seed in range(settings.directions)
    ]
    return {f"{mode}_{scale}_{name}": _mean(values) for name, values in shapes(lines).items()}


def shapes(lines: list[landscape.Slice]) -> dict[str, list[float]]:
    """Return what slices look like: the paper's variance, and what polynomials leave of each.

    `rest` is the r.m.s. rest of a quartic over the range of the losses, 0 for a smooth line and
    about .2 for noise; `turns` counts changes of slope.
    Slices with a point that is not finite are left out.
    """
    whole = [line for line in lines if line.nonfinite == 0]
    fits = [landscape.polynomial_fit(line, degree=_QUARTIC) for line in whole]
    variances = [float(np.var(line.losses)) for line in whole]
    return {
        "variance": variances,
        "worst": [max(variances)] if len(whole) == len(lines) else [],
        "rest": [fit.share for fit in fits],
        "turns": [float(fit.turns) for fit in fits],
    }


def _mean(values: list[float]) -> dict[str, Any]:
    if not values:
        return {"value": None, "reason": "the loss is not finite on the slices"}
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
    return {"value": float(np.mean(values)), "error": spread}
