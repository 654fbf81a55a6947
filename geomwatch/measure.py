"""One measurement of the geometry of a loss, without a monitor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from geomwatch.curvature.checks import check_count, check_loss_and_batch, check_optimizer
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.placement import choose_shards
from geomwatch.curvature.settings import LossFn
from geomwatch.curvature.side_effects import side_effects
from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import choose_backend
from geomwatch.isolation.signals import traceless
from geomwatch.parallel.ranks import Ranks, unwrapped
from geomwatch.quantities.measurement import Measurement, check_how, refuse_options
from geomwatch.quantities.plan import Budget
from geomwatch.quantities.probe import Probe
from geomwatch.quantities.table import evaluate, evaluate_layers, ritz_indices
from geomwatch.records import Record
from geomwatch.sinks.log import logger
from geomwatch.stability.problem import learning_rates, stability_of
from geomwatch.stability.scale_invariance import ScaleInvariance
from geomwatch.stability.scaled import Stability
from geomwatch.vectors.layout import Layout, generator


@traceless
def measure(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    optimizer: Any = None,
    how: Measurement | None = None,
    quantities: str | Sequence[str] | None = None,
    samples: int = 8,
    max_hvps: int = 20,
    **gone: Any,
) -> Record:
    """Measure the geometry of the loss at the model's present weights, once.

    `loss_fn(model, batch)` gives the scalar loss. With an `optimizer` the stability margin of its
    next step is measured too. The model, its gradients and the global random generators (torch's,
    NumPy's, Python's) are left as they were. `how` says what is measured and how: a Measurement;
    `quantities` is short for those of one, and stands in place of them.

    Costs at most `max_hvps` HVPs for each operator, `samples` for the trace, one or two for the
    sharpness along the gradient, a check of double backward on four items, and two forward passes
    for a check of what the loss changes.

    Raises:
        UsageError: (a ValueError, or a TypeError too) loss_fn gives no scalar tensor, the batch is
            on another device, a quantity needs an optimizer, or no parameter requires grad.

    Example:
        >>> import torch
        >>> from geomwatch import measure
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return 3 * model(batch).pow(2).mean()
        >>> record = measure(model, loss_fn, torch.ones(4, 1), quantities="lambda_max")
        >>> round(record["lambda_max"].value, 3)
        6.0
    """
    refuse_options("measure(model, loss_fn, batch", gone)
    how = check_how(how)
    how = how if quantities is None else replace(how, quantities=quantities)
    check_count("samples", samples, 1)
    check_count("max_hvps", max_hvps, 1)
    if optimizer is not None:
        check_optimizer(optimizer)
    check_loss_and_batch(loss_fn, batch, "measure")
    names = how.names(has_optimizer=optimizer is not None)
    ranks, model = Ranks.of(model), unwrapped(model)
    start = time.perf_counter()
    subject, sharding = choose_shards(
        Subject(model, loss_fn, Layout.of(model, how.params), how, ranks)
    )
    for effect in side_effects(subject, batch).told():
        logger.warning("%s", effect)
    subject, facts = choose_backend(subject, batch)
    with subject.on([batch]) as objective:
        if "obstacle" in facts:
            objective.forgo_hvps(str(facts["obstacle"]))
        probe = Probe(
            objective,
            stability=_stability(optimizer, objective),
            budget=Budget(lanczos=max_hvps, samples=samples),
            rng=generator(how.seed),
            until=ritz_indices(names),
            groups=getattr(optimizer, "param_groups", ()),
        )
        estimates = evaluate(probe, names)
        if how.per_layer:
            estimates |= evaluate_layers(probe)
        provenance = objective.provenance | facts | sharding | {"hvps": objective.hvps}
        loss = objective.loss()
    return Record(
        step=0,
        loss=loss,
        lr=learning_rates(optimizer) if optimizer is not None else (),
        seconds=time.perf_counter() - start,
        estimates=estimates,
        provenance=provenance,
    )


def _stability(optimizer: Any, objective: Objective) -> Stability | None:
    if optimizer is None:
        return None
    layout, gradient = objective.layout, objective.gradient()
    invariant = ScaleInvariance().update(layout, gradient)
    return stability_of(optimizer, layout, gradient=gradient, exclude=invariant)
