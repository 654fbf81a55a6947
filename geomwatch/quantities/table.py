"""Every quantity by name: a function from a Probe to an Estimate."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from geomwatch.errors import (
    NoCurvatureError,
    UsageError,
    UsageTypeError,
    WithheldError,
    nearest,
)
from geomwatch.estimators.critical_lr import critical_lr
from geomwatch.estimators.effective_rank import effective_rank
from geomwatch.estimators.hutchinson import mean_with_stderr
from geomwatch.estimators.layers import layer_lambda_max, layer_trace
from geomwatch.estimators.noise import gradient_noise_scale, temperature
from geomwatch.estimators.normalized_sharpness import (
    normalized_sharpness,
    normalized_sharpness_linf,
)
from geomwatch.estimators.roughness import roughness, roughness_residual
from geomwatch.estimators.sharpness import sharpness_by_losses
from geomwatch.estimators.stochastic_margin import stochastic_margin
from geomwatch.isolation.signals import traceless
from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.probe import Probe
from geomwatch.records import Estimate


@dataclass(frozen=True, slots=True)
class Quantity:
    """A row of the table: how a quantity is had from a Probe, and when a monitor measures it.

    `pace` is "dense" (at every probe), "usual" (at every probe of a calm run), "slow" (dear, or
    slow to move: now and then) or "asked" (only for who names it, or "all").
    """

    of: Callable[[Probe], Estimate]
    pace: Literal["dense", "usual", "slow", "asked"] = "usual"
    needs_optimizer: bool = False
    needs_products: bool = True
    ritz: int | None = None  # the Ritz value that has to converge, largest first


def check_names(quantities: object) -> None:
    """Refuse what names no quantities.

    Raises:
        UsageError: a name is unknown.
    """
    if quantities in ("default", "all"):
        return
    if not isinstance(quantities, str | Sequence):
        raise UsageTypeError(
            f'quantities must be "default", "all" or a list of names, got {quantities!r}.'
        )
    for name in (quantities,) if isinstance(quantities, str) else quantities:
        if name not in QUANTITIES:
            raise UsageError(
                f'quantities must be "default", "all" or a list of known names, got {name!r}.'
                f" Known: {', '.join(QUANTITIES)}.",
                write=f'Measurement(quantities=["{nearest(name, QUANTITIES) or "lambda_max"}"])',
            )


def resolve(quantities: str | Sequence[str], *, has_optimizer: bool) -> tuple[str, ...]:
    """Turn "default", "all" or a list of names into names.

    Raises:
        UsageError: a name is unknown, or needs an optimizer that was not passed.
    """
    check_names(quantities)
    if quantities in ("default", "all"):
        names = DEFAULT if quantities == "default" else tuple(QUANTITIES)
        return tuple(n for n in names if has_optimizer or not QUANTITIES[n].needs_optimizer)
    names = (quantities,) if isinstance(quantities, str) else tuple(quantities)
    for name in names:
        if QUANTITIES[name].needs_optimizer and not has_optimizer:
            raise UsageError(f"quantity {name!r} needs optimizer=, got None. Pass the optimizer.")
    return names


def paces_of(names: Sequence[str]) -> dict[str, str]:
    """Return how often a monitor measures each of these by itself."""
    return {name: QUANTITIES[name].pace for name in names}


def ritz_indices(names: Collection[str]) -> tuple[int, ...]:
    """Return which Ritz values, largest first, quantities need to be converged."""
    indices = (QUANTITIES[name].ritz for name in names)
    return tuple({0} | {index for index in indices if index is not None})


def evaluate(probe: Probe, names: Collection[str]) -> dict[str, Estimate]:
    """Evaluate quantities; one that fails gets a reason and leaves the others alone."""
    if not probe.objective.is_finite():
        reason = "the loss or its gradient is not finite at this point"
        return {name: Estimate(None, status="failed", reason=reason) for name in names}
    ranks = probe.objective.ranks
    found = {n: attempt(partial(q.of, probe), ranks) for n, q in QUANTITIES.items() if n in names}
    return {name: found[name] for name in names}


def evaluate_layers(probe: Probe) -> dict[str, Estimate]:
    """Evaluate lambda_max and trace of each module's own block, as "lambda_max/<module>".

    Costs up to 10 HVPs a module beyond those of the trace.
    """
    if not probe.objective.is_finite():
        return {}
    layout, hvp = probe.objective.layout, probe.objective.hvp
    tops = layer_lambda_max(hvp, layout, rng=probe.rng)
    found = {f"lambda_max/{module}": estimate for module, estimate in tops.items()}
    if len(probe.samples.quadratic) >= 2:
        traces = layer_trace(probe.samples, layout)
        found |= {f"trace/{module}": estimate for module, estimate in traces.items()}
    return found


@traceless
def attempt(quantity: Callable[[], Estimate], ranks: Ranks | None = None) -> Estimate:
    """Return an estimate, or one without a value that says why it could not be had.

    Where it fails on one rank it does on all. They leave it together: one sum of a number.

    Raises:
        OutOfMemoryError: memory ran out on this rank; the other quantities would fail as well.
        RankError: it did on another.
    """
    ranks = ranks or Ranks()
    try:
        with ranks.together():
            estimate = quantity()
    except Exception as error:  # whatever the loss raises, it is for the user to read
        if ranks.any(isinstance(error, torch.OutOfMemoryError)):
            raise
        return _missing(error)
    if estimate.value is not None and not math.isfinite(estimate.value):
        reason = f"it came out as {estimate.value}"
        return replace(estimate, value=None, error=None, status="failed", reason=reason)
    return estimate


def _missing(error: Exception) -> Estimate:
    if isinstance(error, WithheldError):
        return Estimate(None, status="withheld", reason=str(error))
    if isinstance(error, NoCurvatureError):
        return Estimate(None, status="failed", reason=f"no curvature here: {error}")
    return Estimate(None, status="failed", reason=f"{type(error).__name__}: {error}")


def _loss(probe: Probe) -> Estimate:
    return Estimate(probe.objective.loss())


def _grad_norm(probe: Probe) -> Estimate:
    return Estimate(float(probe.objective.gradient().norm()))


def _ritz(index: int) -> Callable[[Probe], Estimate]:
    def quantity(probe: Probe) -> Estimate:
        s = probe.spectrum
        if not -len(s.values) <= index < len(s.values):
            return Estimate(None, status="withheld", reason="the model has too few parameters")
        return Estimate(s.values[index], s.residuals[index], "residual", hvps=s.hvps)

    return quantity


def _spectral_gap(probe: Probe) -> Estimate:
    first, second = _ritz(0)(probe), _ritz(1)(probe)
    if first.value is None or second.value is None:
        return second
    error = (first.error or 0.0) + (second.error or 0.0)
    return Estimate(first.value - second.value, error, "residual", hvps=first.hvps)


def _stability_margin(probe: Probe) -> Estimate:
    assert probe.stability is not None
    s = probe.margin_spectrum
    return Estimate(
        s.values[0],
        s.residuals[0],
        "residual",
        status=probe.stability.status,
        reason=probe.stability.reason,
        hvps=s.hvps,
    )


def _stochastic_margin(probe: Probe) -> Estimate:
    """The largest over the groups, which differ in little but their momentum."""
    assert probe.stability is not None
    s, curvature = probe.stability, probe.margin_spectrum.values[0]
    found = [
        stochastic_margin(probe.curvature_spread, recursion, curvature=curvature)
        for recursion in s.recursions
    ]
    if not found:
        raise WithheldError("the coming step moves no measured parameter")
    largest = max(found, key=lambda e: -math.inf if e.value is None else e.value)
    if largest.value is None or s.status == "ok":
        return replace(largest, hvps=1)
    return replace(largest, status=s.status, reason=s.reason, hvps=1)


def _batch_sharpness(probe: Probe) -> Estimate:
    try:
        return Estimate(probe.batch_sharpness, hvps=1)
    except NoCurvatureError:
        gradient = probe.objective.gradient()
        slope = float(gradient @ gradient)
        return sharpness_by_losses(probe.objective.loss_at, gradient, probe.readout, slope=slope)


def _trace(probe: Probe) -> Estimate:
    return probe.trace


def _trace_per_param(probe: Probe) -> Estimate:
    return scaled(probe.trace, 1 / probe.objective.layout.dim)


def _trace_squared(probe: Probe) -> Estimate:
    return mean_with_stderr(probe.samples.squared, hvps=len(probe.samples.squared))


def _effective_rank(probe: Probe) -> Estimate:
    ends = probe.spectrum.values
    return effective_rank(probe.samples, smallest=ends[-1], largest=ends[0])


def _roughness(probe: Probe) -> Estimate:
    return roughness(probe.slices)


def _roughness_residual(probe: Probe) -> Estimate:
    return roughness_residual(probe.slices)


def _normalized_sharpness(probe: Probe) -> Estimate:
    return normalized_sharpness(probe.objective, probe.readout, rng=probe.rng)


def _normalized_sharpness_linf(probe: Probe) -> Estimate:
    return normalized_sharpness_linf(probe.objective, probe.readout, rng=probe.rng)


def _critical_lr(probe: Probe) -> Estimate:
    """Along the preconditioned gradient P^-1 g, without momentum; along g without an optimizer.

    To be held against lr, or lr / (1 - mu) under heavy ball. With several groups, against the
    largest of their rates.
    """
    gradient, readout, s = probe.objective.gradient(), probe.readout, probe.stability
    tiny = torch.finfo(gradient.dtype).tiny
    if s is None:
        slope = float(gradient @ gradient)
        start = abs(readout.loss) / max(slope, tiny)  # Polyak's step
        return critical_lr(probe.objective.loss_at, gradient, readout, slope=slope, start=start)
    # S^2 = rate / threshold P^-1: without the thresholds, which momentum has a part in
    squared = s.scale**2
    rate = torch.where(squared > 0, squared / s.inverse_preconditioner, 0).amax().clamp_min(tiny)
    direction = s.sign * squared * gradient / rate
    found = critical_lr(
        lambda d: s.sign * probe.objective.loss_at(d),
        direction,
        replace(readout, loss=s.sign * readout.loss),
        slope=s.sign * float(gradient @ direction),
        start=2 * float(rate) * s.limit_ratio,
    )
    if found.value is None or s.status == "ok":
        return found
    return replace(found, status=s.status, reason=s.reason)


def _gradient_noise_scale(probe: Probe) -> Estimate:
    return gradient_noise_scale(probe.gradient_spread)


def _temperature(probe: Probe) -> Estimate:
    """With the gradient that has settled in the momentum: the largest group's lr and momentum."""
    group = max(probe.groups, key=lambda g: float(g["lr"]))
    return temperature(
        probe.gradient_spread,
        lr=float(group["lr"]),
        dim=probe.objective.layout.dim,
        momentum=float(group.get("momentum", 0.0)),
    )


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Multiply an estimate and its error by a positive factor."""
    if estimate.value is None:
        return estimate
    error = None if estimate.error is None else estimate.error * factor
    return replace(estimate, value=estimate.value * factor, error=error)


def _difficulty(probe: Probe) -> Estimate:
    reason = "a sum over the steps of a run; a Monitor keeps it"
    return Estimate(None, status="withheld", reason=reason)


QUANTITIES: dict[str, Quantity] = {
    # In the order of evaluation: what uses the graph of the gradient comes before what drops it.
    "loss": Quantity(_loss, "dense", needs_products=False),
    "grad_norm": Quantity(_grad_norm, "dense", needs_products=False),
    "stability_margin": Quantity(_stability_margin, "dense", needs_optimizer=True),
    "lambda_max": Quantity(_ritz(0), "dense", ritz=0),
    "lambda_2": Quantity(_ritz(1), "asked", ritz=1),
    "lambda_3": Quantity(_ritz(2), "asked", ritz=2),
    "lambda_min": Quantity(_ritz(-1), "asked", ritz=-1),
    "spectral_gap": Quantity(_spectral_gap, "slow", ritz=1),
    "batch_sharpness": Quantity(_batch_sharpness, needs_products=False),
    "trace": Quantity(_trace),
    "trace_per_param": Quantity(_trace_per_param),
    "trace_squared": Quantity(_trace_squared, "asked"),
    "effective_rank": Quantity(_effective_rank, "slow"),
    "stochastic_margin": Quantity(_stochastic_margin, "slow", needs_optimizer=True),
    "gradient_noise_scale": Quantity(_gradient_noise_scale, "slow"),
    "temperature": Quantity(_temperature, "asked", needs_optimizer=True),
    "roughness": Quantity(_roughness, "slow"),
    "roughness_residual": Quantity(_roughness_residual, "slow"),
    "normalized_sharpness": Quantity(_normalized_sharpness, "slow"),
    "normalized_sharpness_linf": Quantity(_normalized_sharpness_linf, "asked"),
    "critical_lr": Quantity(_critical_lr, "asked", needs_products=False),
    "difficulty": Quantity(_difficulty, needs_optimizer=True, needs_products=False),
}
DEFAULT = tuple(name for name, q in QUANTITIES.items() if q.pace != "asked")
WITHOUT_HVPS = tuple(name for name, q in QUANTITIES.items() if not q.needs_products)
