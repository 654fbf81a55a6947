"""One measurement of the geometry of a loss, without a monitor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from geomwatch.curvature.checks import check_count, check_optimizer
from geomwatch.curvature.objective import LossFn, Objective
from geomwatch.curvature.placement import choose_shards
from geomwatch.curvature.validation import choose_backend
from geomwatch.parallel.ranks import Ranks, unwrapped
from geomwatch.quantities.probe import Budget, Probe
from geomwatch.quantities.table import evaluate, evaluate_layers, resolve, ritz_indices
from geomwatch.records import Record
from geomwatch.stability.problem import learning_rates, stability_of
from geomwatch.stability.scale_invariance import ScaleInvariance
from geomwatch.vectors.layout import Layout, generator


def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    quantities: str | Sequence[str] = "default",
    mode: str = "train",
    operator: str = "hessian",
    params: str | Sequence[str] | None = None,
    also: Sequence[object] = (),
    micro_batch: int | None = None,
    per_layer: bool = False,
    hvp: str = "auto",
    precision: str = "float32",
    samples: int = 8,
    max_hvps: int = 20,
    seed: int = 0,
) -> Record:
    """Measure the geometry of the loss at the model's present weights, once.

    `loss_fn(model, batch)` gives the scalar loss. With an `optimizer` the stability margin of its
    next step is measured too. The model, its gradients and the global random generators (torch's,
    NumPy's, Python's) are left as they were. `operator` is "hessian" or "ggn", the generalised
    Gauss-Newton matrix; `hvp` chooses how HVPs are computed: "auto", "double_backward" or
    "finite_difference"; `precision` is "float32" (without autocast) or "training".
    `micro_batch` bounds the memory to that of so many items; each HVP is then dearer by a gradient.

    Costs at most `max_hvps` HVPs for each operator, `samples` for the trace, one or two for the
    sharpness along the gradient, and a check of double backward on four items. With `per_layer`
    up to 10 more for each module, for its own `lambda_max/<module>` and `trace/<module>`.

    Raises:
        UsageError: (a ValueError, or a TypeError too) loss_fn gives no scalar tensor, the batch is
            on another device, a quantity is unknown, or no parameter requires grad.
    """
    check_count("samples", samples, 1)
    check_count("max_hvps", max_hvps, 1)
    if optimizer is not None:
        check_optimizer(optimizer)
    names = resolve(quantities, has_optimizer=optimizer is not None)
    ranks, model = Ranks.of(model), unwrapped(model)
    choice = choose_shards(model, Layout.of(model, params), ranks, hvp=hvp, operator=operator)
    layout = choice.layout
    start = time.perf_counter()
    options: dict[str, Any] = {
        "layout": layout,
        "mode": mode,
        "operator": operator,
        "also": also,
        "precision": precision,
        "micro_batch": micro_batch,
        "ranks": ranks,
    }
    backend, facts = choose_backend(model, loss_fn, batch, choice.hvp, options)
    with Objective(model, loss_fn, [batch], hvp=backend, **options) as objective:
        if "obstacle" in facts:
            objective.forgo_hvps(str(facts["obstacle"]))
        stability = None
        if optimizer is not None:
            gradient = objective.gradient()
            invariant = ScaleInvariance().update(layout, gradient)
            stability = stability_of(optimizer, layout, gradient=gradient, exclude=invariant)
        probe = Probe(
            objective,
            stability=stability,
            budget=Budget(lanczos=max_hvps, samples=samples),
            rng=generator(seed),
            until=ritz_indices(names),
            groups=getattr(optimizer, "param_groups", ()),
        )
        estimates = evaluate(probe, names)
        if per_layer:
            estimates |= evaluate_layers(probe)
        how = objective.provenance | facts | choice.facts | {"hvps": objective.hvps}
        loss = objective.loss()
    return Record(
        step=0,
        loss=loss,
        lr=learning_rates(optimizer) if optimizer is not None else (),
        seconds=time.perf_counter() - start,
        estimates=estimates,
        provenance=how,
    )
