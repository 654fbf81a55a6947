"""One measurement of the geometry of a loss, without a monitor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from geomwatch.invariance import ScaleInvariance
from geomwatch.objective import LossFn, Objective
from geomwatch.probe import Budget, Probe
from geomwatch.quantities import evaluate, resolve, ritz_indices
from geomwatch.records import Record
from geomwatch.stability import learning_rates, stability_of
from geomwatch.vectors import Layout


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    quantities: str | Sequence[str] = "default",
    mode: str = "train",
    params: str | Sequence[str] | None = None,
    also: Sequence[object] = (),
    samples: int = 8,
    max_hvps: int = 20,
    seed: int = 0,
) -> Record:
    """Measure the geometry of the loss at the model's present weights, once.

    `loss_fn(model, batch)` gives the scalar loss. With an `optimizer` the stability margin of its
    next step is measured too. The model, its gradients and every random generator are left as
    they were. Costs at most `max_hvps` HVPs for each operator, `samples` for the trace, one or
    two for the sharpness along the gradient.

    Raises:
        UsageError: (a ValueError, or a TypeError too) loss_fn gives no scalar tensor, the batch is
            on another device, a quantity is unknown, or no parameter requires grad.
    """
    names = resolve(quantities, has_optimizer=optimizer is not None)
    layout = Layout.of(model, params)
    start = time.perf_counter()
    with Objective(model, loss_fn, [batch], layout=layout, mode=mode, also=also) as objective:
        stability = None
        if optimizer is not None:
            gradient = objective.gradient()
            invariant = ScaleInvariance().update(layout, gradient)
            stability = stability_of(optimizer, layout, gradient=gradient, exclude=invariant)
        probe = Probe(
            objective,
            stability=stability,
            budget=Budget(lanczos=max_hvps, samples=samples),
            rng=torch.Generator().manual_seed(seed),
            until=ritz_indices(names),
        )
        estimates = evaluate(probe, names)
        how = objective.how | {"hvps": objective.hvps}
        loss = objective.loss()
    return Record(
        step=0,
        loss=loss,
        lr=learning_rates(optimizer) if optimizer is not None else (),
        seconds=time.perf_counter() - start,
        estimates=estimates,
        how=how,
    )
