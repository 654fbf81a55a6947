"""The density of the Hessian's eigenvalues by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.curvature.checks import check_count
from geomwatch.curvature.settings import LossFn
from geomwatch.curvature.subject import Subject
from geomwatch.curvature.validation import choose_backend
from geomwatch.errors import UsageError
from geomwatch.estimators.lanczos import Operator, lanczos
from geomwatch.isolation.signals import traceless
from geomwatch.landscape.bar import Progress, reporter
from geomwatch.landscape.data import Batches
from geomwatch.landscape.provenance import provenance, steadiness
from geomwatch.landscape.results import Density, Floats
from geomwatch.parallel.ranks import Ranks
from geomwatch.quantities.measurement import Measurement, check_how
from geomwatch.vectors.layout import Layout, generator

_POINTS, _MARGIN = 1_001, 4.0  # of the grid, which goes on for so many sigmas
_SHORTER = 0.75  # the quadrature's own error is what a quarter of its nodes changes
_CONVERGED = 1e-2  # residual of an eigenvalue that is taken for exact, in sigmas


class Run(NamedTuple):
    """The Gauss quadrature of f(H) that one random vector makes."""

    nodes: Floats  # (steps,)
    weights: Floats  # (steps,), which add up to the share of eigenvalues that are not known


@traceless
def density(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    how: Measurement | None = None,
    *,
    vectors: int = 8,
    steps: int = 40,
    sigma: float | None = None,
    outliers: int = 10,
    progress: Progress = False,
) -> Density:
    """Estimate the spectral density phi(t) = 1/D sum_i N(t; lambda_i, sigma^2) of the Hessian.

    Each of `vectors` random v starts `steps` of Lanczos; the Ritz values theta_j with weights
    (v . y_j)^2 are the nodes of the Gauss quadrature of v' N(t; H, sigma^2) v, whose mean over v
    is phi (Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019; Yao et al. 2020). Up to
    `outliers` of the largest eigenvalues that have converged in the first run count exactly once,
    and the other vectors are taken orthogonal to theirs: of a peak of one eigenvalue a random
    vector sees anything between nothing and ten times its height.

    `error` is what the curve may be off by anywhere on the grid, at a nominal 95 %: Student's t
    over v for as many peaks as fit on it, and what the last quarter of the steps changes. (On four
    known spectra with 8 vectors it held 99.5 % of the points, the whole curve in 93 % of 120 runs.)

    Costs vectors x steps HVPs and holds steps + outliers vectors of size D. With several batches
    each HVP goes through all of them.

    Args:
        how: operator, hvp, precision, mode, micro_batch, params, also and seed count.
        sigma: in units of eigenvalues; by default the range of the spectrum over `steps`. A
            smaller one asks for more steps.
        progress: as in `slice_1d`, of the vectors.

    Raises:
        UsageError: fewer than two vectors, which have no error, or three steps, or the loss is not
            finite.

    Example:
        >>> model = nn.Linear(6, 1, bias=False)
        >>> batches = [torch.arange(1.0, 7).sqrt().diag()]
        >>> found = density(model, lambda m, x: 3 * m(x).square().mean(), batches, steps=6)
        >>> found.exact.round(3).tolist(), found.dim
        ([6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 6)
    """
    how = check_how(how)
    check_count("vectors", vectors, 2)
    check_count("steps", steps, 3)
    check_count("outliers", outliers, 0)
    if sigma is not None and not 0 < sigma < math.inf:
        raise UsageError(f"sigma must be positive and finite, got {sigma!r}.")
    window = list(Batches(batches))
    layout = Layout.of(model, how.params)
    subject = Subject(model, loss_fn, layout, how, Ranks())
    subject, validation = choose_backend(subject, Batches(window).first())
    rng, report = generator(how.seed), reporter(progress, "density")
    with subject.on(window) as objective:
        if not objective.is_finite():
            raise UsageError("the loss and its gradient must be finite to have a Hessian.")
        v = layout.rademacher(rng)
        first, exact, known = _first(objective.hvp, v, steps, outliers, sigma)
        runs = [first]
        report(1, vectors)
        for done in range(2, vectors + 1):
            runs.append(_next(objective.hvp, layout.rademacher(rng), steps, known))
            report(done, vectors)
        facts = provenance(model, loss_fn) | objective.provenance | validation
        facts |= {"hvps": objective.hvps, "seed": how.seed}
        facts |= steadiness(lambda: objective.loss_at(layout.zeros()))[1]
    facts |= {"vectors": vectors, "steps": steps, "exact": len(exact)}
    found = quadrature(runs, layout.dim, known=exact, sigma=sigma)
    return replace(found, hvps=objective.hvps, provenance=facts)


def _first(
    operator: Operator, start: Tensor, steps: int, outliers: int, sigma: float | None
) -> tuple[Run, Floats, Tensor]:
    """Run Lanczos once; return its quadrature, and apart from it what has converged.

    That is k eigenvalues, (k,), and their orthonormal eigenvectors, (k, D).
    """
    found = lanczos(operator, start, max_hvps=steps, top=max(outliers, 1))
    values, residuals = np.array(found.values), np.array(found.residuals)
    width = _default_sigma(values, steps) if sigma is None else sigma
    good = residuals[: len(found.vectors)] <= _CONVERGED * width
    count = int(np.argmin([*good[:outliers], False]))  # down to the first that has not converged
    overlaps, share = np.array(found.weights), 1 - count / start.numel()
    if share > 0 and not overlaps[count:].sum() > 0:  # of all else this run has seen nothing
        count, share = 0, 1.0
    weights = overlaps[count:]
    run = Run(values[count:], share * weights / max(weights.sum(), sys.float_info.min))
    return run, values[:count], found.vectors[:count]


def _next(operator: Operator, start: Tensor, steps: int, known: Tensor) -> Run:
    """Run Lanczos among the vectors orthogonal to the known ones."""

    def outside(v: Tensor) -> Tensor:
        return v - known.T @ (known @ v)

    left = start.numel() - len(known)
    if left == 0:
        return Run(np.empty(0), np.empty(0))
    run = lanczos_nodes(lambda v: outside(operator(outside(v))), outside(start), min(steps, left))
    return run._replace(weights=left / start.numel() * run.weights)


def quadrature(
    runs: Sequence[Run], dim: int, *, known: Floats | None = None, sigma: float | None = None
) -> Density:
    """Return the density that some runs and some known eigenvalues stand for.

    Args:
        dim: D, of which each known eigenvalue is one.
    """
    exact = np.empty(0) if known is None else known
    every = np.concatenate([exact, *(run.nodes for run in runs)])
    longest = max(1, *(len(run.nodes) for run in runs))
    width = _default_sigma(every, longest) if sigma is None else sigma
    grid = _grid(every, width)
    curves = np.stack([_smooth(grid, run, width) for run in runs])  # (vectors, points)
    shorter = np.stack([_smooth(grid, _shortened(run), width) for run in runs])
    stderr = curves.std(axis=0, ddof=1) / math.sqrt(len(runs))
    peaks = math.ceil(float(grid[-1] - grid[0]) / width)
    outer = _smooth(grid, Run(exact, np.full(len(exact), 1 / dim)), width)
    traces = exact.sum() + dim * np.array([run.nodes @ run.weights for run in runs])
    return Density(
        grid=grid,
        density=outer + curves.mean(axis=0),
        error=student_t(len(runs) - 1, peaks) * stderr + abs((curves - shorter).mean(axis=0)),
        nodes=np.stack([_padded(run.nodes, longest) for run in runs]),
        weights=np.stack([_padded(run.weights, longest) for run in runs]),
        exact=exact,
        sigma=width,
        dim=dim,
        trace=float(traces.mean()),
        trace_error=float(traces.std(ddof=1)) / math.sqrt(len(runs)),
        hvps=0,
        provenance={},
    )


def lanczos_nodes(operator: Operator, start: Tensor, steps: int) -> Run:
    """Return the Gauss quadrature that Lanczos makes, weights that add up to 1."""
    found = lanczos(operator, start, max_hvps=steps, top=1)
    return Run(np.array(found.values), np.array(found.weights))


def student_t(freedom: int, count: int) -> float:
    """Return the t that `count` independent means all stay below at 95 %, in absolute value.

    By the integral of cos^(freedom - 1), which Student's distribution is in t = sqrt(freedom) tan.
    """
    angles = np.linspace(0, math.pi / 2, 200_001)
    mass = np.cumsum(np.cos(angles) ** (freedom - 1))
    share = 0.95 ** (1 / count)
    return math.sqrt(freedom) * math.tan(float(np.interp(share, mass / mass[-1], angles)))


def _default_sigma(values: Floats, steps: int) -> float:
    """The range of the spectrum over the steps; a spectrum of one point has no range."""
    return max(float(np.ptp(values)) / steps, 1e-3 * float(abs(values).max())) or 1.0


def _grid(values: Floats, width: float) -> Floats:
    low, high = float(values.min()), float(values.max())
    points = min(max(_POINTS, math.ceil(4 * (high - low) / width)), 20 * _POINTS)
    return np.linspace(low - _MARGIN * width, high + _MARGIN * width, points)


def _shortened(run: Run) -> Run:
    """The quadrature that fewer steps would have made: Lanczos on the nodes themselves."""
    if len(run.nodes) < 2:
        return run
    values = torch.from_numpy(run.nodes.copy())
    start = torch.from_numpy(np.sqrt(run.weights))
    steps = math.floor(_SHORTER * len(run.nodes))
    shorter = lanczos_nodes(lambda v: values * v, start, steps)
    return shorter._replace(weights=run.weights.sum() * shorter.weights)


def _smooth(grid: Floats, run: Run, sigma: float) -> Floats:
    z = (grid[:, None] - run.nodes) / sigma
    bells: Floats = np.exp(-0.5 * z * z) @ run.weights / (sigma * math.sqrt(2 * math.pi))
    return bells


def _padded(values: Floats, length: int) -> Floats:
    return np.pad(values, (0, length - len(values)), constant_values=np.nan)
