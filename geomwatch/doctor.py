"""What geomwatch will use for a model, why, and at what cost: a table to paste into an issue."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from geomwatch.curvature import batches
from geomwatch.curvature.checks import check_loss, check_loss_and_batch, check_optimizer
from geomwatch.curvature.double_backward import gradients
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import LossFn
from geomwatch.curvature.side_effects import side_effects
from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import choose_backend
from geomwatch.estimators.noise_floor import read_out
from geomwatch.isolation.random_state import RandomState
from geomwatch.isolation.signals import traceless
from geomwatch.monitoring.budget import DEFAULT_BUDGET, check_pace
from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.measurement import Measurement, check_how, refuse_options
from geomwatch.records import VERSION
from geomwatch.stability.problem import stability_of, unwrap
from geomwatch.stability.scale_invariance import ScaleInvariance
from geomwatch.vectors.layout import Layout, generator

_HVPS = 7  # of a recurring probe: five for Lanczos, one for the trace, one along the gradient
_VECTORS = 16  # Krylov vectors of a monitor's first probe, which keeps the most


@dataclass(frozen=True, slots=True, repr=False)
class Diagnosis:
    """What `doctor` found; `rows` has all of it in words, and why a number is None."""

    rows: Mapping[str, str]
    backend: str | None  # None where there are no HVPs
    validated: bool
    step_seconds: float | None  # of a training step, forward and backward
    costs: Mapping[str, float]  # of "graph", "hvp" and "probe", in training steps
    every: int | None
    replays: bool  # two evaluations of the loss at the same weights agree
    scale_invariant: tuple[str, ...]  # names of parameters
    limit_known: bool  # the optimizer's stability limit
    trainable: int  # D

    def __str__(self) -> str:
        """Return the table."""
        rows = self.rows.items()
        return "\n".join(f"{name:<16} {' '.join(value.split())}" for name, value in rows)

    __repr__ = __str__


@traceless
def doctor(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    optimizer: Any = None,
    how: Measurement | None = None,
    budget: float = DEFAULT_BUDGET,
    **gone: Any,
) -> Diagnosis:
    """Tell how geomwatch will measure this model, what stands in its way, and what it costs.

    `how` is what the Monitor will be given. A probe is timed as it recurs, with the gradient's
    graph and 7 HVPs: if it takes c training steps (forward and backward, without the optimizer),
    `every` is c / budget rounded up to 10, 20, 50, 100, ... The model, its gradients and all random
    generators are left as they were. Costs about 15 steps and 14 HVPs. A loss or an option that is
    refused is a UsageError.
    """
    refuse_options("doctor(model, loss_fn, batch", gone)
    how = check_how(how)
    check_pace(None, budget)
    check_loss_and_batch(loss_fn, batch, "doctor")
    if optimizer is not None:
        check_optimizer(optimizer)
    subject = Subject(model, loss_fn, Layout.of(model, how.params), how, Ranks())
    found, rows = _look(subject, batch, optimizer)
    subject, facts = choose_backend(subject, batch)
    provenance: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    failure = ""
    try:
        _time_step(subject, batch, seconds)
        _time_probe(subject, batch, provenance, seconds)
    except Exception as reason:  # no memory for it, say
        failure = f"not measured, {type(reason).__name__}: {reason}"
    step = seconds.pop("step", None)
    costs = {name: s / step for name, s in seconds.items()} if step else {}
    every = _round_up(costs["probe"] / budget) if costs else None
    wrong, error = subject.how.hvp == "finite_difference", facts.get("validation_error")
    fallback = "see validation" if wrong else provenance.get("fallback", "none")
    rows["HVPs by"] = (
        f"{provenance['backend']}, in {provenance['dtype']}" if provenance else failure
    )
    rows["fallback"] = fallback
    rows["validation"] = str(facts.get("validation") or f"passed; relative error {error:.1g}")
    rows["training step"] = f"{step:.3g} s, forward and backward" if step else failure
    for name in ("graph", "hvp", "probe"):
        rows[f"cost of {name}"] = f"{costs[name]:.1f} training steps" if costs else failure
    rows["suggested every"] = f"{every} steps, for a budget of {budget:.3g}" if every else failure
    backend, validated = provenance.get("backend"), facts["validated"] is True
    return Diagnosis(rows, backend, validated, step, costs, every, **found)


def _look(subject: Subject, batch: Any, optimizer: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Evaluate the loss and its gradient at the weights; the loss's own errors pass through."""
    model, goes_on = subject.model, side_effects(subject, batch).changed
    with subject.set(hvp="finite_difference", operator="hessian").on([batch]) as objective:
        mode, layout = str(objective.provenance["mode"]), objective.layout
        flags = [(type(m).__name__, m.training) for m in model.modules()]
        before = RandomState()
        gradient = objective.gradient()  # from the state before, and leaves the one after it
        drawn = before.changed()
        readout = read_out(objective.loss_at, layout, rng=generator(0))
        changed, loss = [*objective.changed_objects, *goes_on], objective.loss()
    other = Counter(kind for kind, training in flags if training != (mode == "train"))
    invariant = ScaleInvariance().update(layout, gradient)
    names = tuple(name for name in layout.names if name in invariant)
    trouble = readout.reason if math.isfinite(loss) else "no telling, the loss is not finite"
    limit = _limit(optimizer, layout, gradient, invariant)
    kept = min(_VECTORS, layout.dim) + 1
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    dtypes = _listed({p.dtype for p in layout.params})
    found = {"replays": not trouble, "scale_invariant": names, "limit_known": not limit}
    return found | {"trainable": layout.dim}, {
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"geomwatch {VERSION}",
        "device": _listed({p.device for p in layout.params}),
        "parameters": f"{layout.dim:,} trainable in {dtypes}, {frozen:,} frozen",
        "Krylov basis": f"{kept * layout.dim * layout.dtype.itemsize / 1e6:.3g} MB, {kept} rows",
        "mode": ", but ".join([mode, *(f"not {n} {kind}" for kind, n in other.items())]),
        "batch": f"{objective.items} items",
        "loss": f"{loss:.6g}, gradient norm {float(gradient.norm()):.3g}",
        "randomness": "drawn from global generators, replayed" if drawn else "none drawn",
        "evaluated twice": trouble or f"agrees; rounding {readout.floor:.1g}",
        "left changed": _listed(changed) or "nothing",
        "scale-invariant": _listed(names) or "no tensor",
        "optimizer": type(unwrap(optimizer)).__name__ if optimizer else "not passed",
        "stability limit": limit or "known",
    }


def _limit(optimizer: Any, layout: Layout, gradient: Tensor, invariant: frozenset[str]) -> str:
    """Say why the stability limit is not known; "" if it is."""
    if optimizer is None:
        return "none, no optimizer"
    try:
        return stability_of(optimizer, layout, gradient=gradient, exclude=invariant).reason
    except Exception as error:  # of an optimizer that we do not know
        return f"none, {type(error).__name__}: {error}"


def _time_step(subject: Subject, batch: Any, seconds: dict[str, float]) -> None:
    def step() -> None:
        loss = check_loss(subject.loss_fn(subject.model, batches.fresh_copy(batch)))
        gradients(loss, objective.layout, create_graph=False)

    with subject.set(precision="training").on([batch]) as objective:
        step()  # the first one allocates, and chooses kernels
        seconds["step"] = statistics.median(_seconds(objective, step) for _ in range(3))


def _time_probe(
    subject: Subject, batch: Any, provenance: dict[str, Any], seconds: dict[str, float]
) -> None:
    for _ in range(2):  # the second one counts
        start = time.perf_counter()
        with subject.on([batch]) as objective:
            product = partial(objective.hvp, objective.layout.rademacher(generator(0)))
            graph = _seconds(objective, objective.gradient)
            products = [_seconds(objective, product) for _ in range(_HVPS)]
            provenance.update(objective.provenance)
        whole = time.perf_counter() - start
    seconds |= {"graph": graph, "hvp": statistics.median(products), "probe": whole}


def _seconds(objective: Objective, function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if objective.layout.device.type != "cpu":
        torch.accelerator.synchronize(objective.layout.device)
    return time.perf_counter() - start


def _round_up(steps: float) -> int:
    nice = (factor * 10**power for power in itertools.count(1) for factor in (1, 2, 5))
    return int(next(number for number in nice if number >= steps))


def _listed(things: Collection[object]) -> str:
    names = [str(thing).removeprefix("torch.") for thing in things]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
