"""The density of the Hessian's eigenvalues by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geomwatch.checks import check_count
from geomwatch.errors import UsageError
from geomwatch.estimators.hutchinson import student_t
from geomwatch.estimators.lanczos import Operator, lanczos
from geomwatch.landscape.bar import Progress, reporter
from geomwatch.landscape.data import Batches
from geomwatch.landscape.provenance import provenance
from geomwatch.landscape.results import Density, Facts, Floats
from geomwatch.objective import LossFn, Objective
from geomwatch.validation import choose_backend
from geomwatch.vectors import Layout, generator

_POINTS, _MARGIN = 1_001, 4.0  # of the grid, which goes on for so many sigmas
_SHORTER = 0.75  # the quadrature's own error is what a quarter of its nodes changes


def density(
    model: nn.Module,
    loss_fn: LossFn,
    batches: object,
    *,
    vectors: int = 8,
    steps: int = 40,
    sigma: float | None = None,
    mode: str = "train",
    params: str | Sequence[str] | None = None,
    also: nn.Module | Sequence[object] = (),
    hvp: str = "auto",
    precision: str = "float32",
    seed: int = 0,
    progress: Progress = False,
) -> Density:
    """Estimate the spectral density phi(t) = 1/D sum_i N(t; lambda_i, sigma^2) of the Hessian.

    Each of `vectors` random v starts `steps` of Lanczos; the Ritz values theta_j with weights
    (v . y_j)^2 are the nodes of the Gauss quadrature of v' N(t; H, sigma^2) v, whose mean over v
    is phi (Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019; Yao et al. 2020). `error`
    is Student's t times the standard error over v, and what the last quarter of the steps changes.
    The default sigma is the range of the spectrum over `steps`; a smaller one asks for more steps.

    Costs vectors x steps HVPs and holds `steps` vectors of size D. With several batches each HVP
    goes through all of them.

    Raises:
        UsageError: fewer than two vectors, which have no error, or three steps.
    """
    check_count("vectors", vectors, 2)
    check_count("steps", steps, 3)
    window = list(Batches(batches))
    layout = Layout.of(model, params)
    options: dict[str, Any] = {"layout": layout, "mode": mode, "also": also, "precision": precision}
    backend, validation = choose_backend(model, loss_fn, Batches(window).first(), hvp, options)
    rng = generator(seed)
    report = reporter(progress, "density")
    runs = []
    with Objective(model, loss_fn, window, hvp=backend, **options) as objective:
        if not objective.is_finite():
            raise UsageError("the loss and its gradient must be finite to have a Hessian.")
        for done in range(1, vectors + 1):
            start = layout.rademacher(rng)
            runs.append(lanczos_nodes(objective.hvp, start, steps))
            report(done, vectors)
        facts = objective.how | validation | {"hvps": objective.hvps, "seed": seed}
    how = provenance(model, loss_fn, facts | {"vectors": vectors, "steps": steps})
    return quadrature(runs, layout.dim, sigma=sigma, hvps=objective.hvps, how=how)


def quadrature(
    runs: Sequence[tuple[Floats, Floats]],
    dim: int,
    *,
    sigma: float | None = None,
    hvps: int = 0,
    how: Facts | None = None,
) -> Density:
    """Return the density that nodes and weights of some random vectors stand for.

    Args:
        runs: for each vector its nodes and their weights, which add up to 1.
        dim: D.
    """
    longest = max(len(nodes) for nodes, _ in runs)
    low = min(float(nodes.min()) for nodes, _ in runs)
    high = max(float(nodes.max()) for nodes, _ in runs)
    width = _width(sigma, high - low, longest, max(abs(low), abs(high)))
    margin = _MARGIN * width
    points = min(max(_POINTS, math.ceil(4 * (high - low) / width)), 20 * _POINTS)
    grid = np.linspace(low - margin, high + margin, points)
    curves = np.stack([_smooth(grid, *run, width) for run in runs])  # (vectors, points)
    shorter = np.stack([_smooth(grid, *_shortened(*run), width) for run in runs])
    stderr = curves.std(axis=0, ddof=1) / math.sqrt(len(runs))
    rest = abs((curves - shorter).mean(axis=0))
    traces = dim * np.array([nodes @ weights for nodes, weights in runs])
    return Density(
        grid=grid,
        density=curves.mean(axis=0),
        error=student_t(len(runs) - 1) * stderr + rest,
        nodes=np.stack([_padded(nodes, longest) for nodes, _ in runs]),
        weights=np.stack([_padded(weights, longest) for _, weights in runs]),
        sigma=width,
        dim=dim,
        trace=float(traces.mean()),
        trace_error=float(traces.std(ddof=1)) / math.sqrt(len(runs)),
        hvps=hvps,
        how=how or {},
    )


def lanczos_nodes(operator: Operator, start: Tensor, steps: int) -> tuple[Floats, Floats]:
    """Return nodes and weights, (steps,) each, of the Gauss quadrature that Lanczos makes."""
    found = lanczos(operator, start, max_hvps=steps, top=1)
    return np.array(found.values), np.array(found.weights)


def _shortened(nodes: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """The quadrature that fewer steps would have made: Lanczos on the nodes themselves."""
    values = torch.from_numpy(nodes.copy())
    start = torch.from_numpy(np.sqrt(weights))
    return lanczos_nodes(lambda v: values * v, start, max(math.floor(_SHORTER * len(nodes)), 1))


def _smooth(grid: Floats, nodes: Floats, weights: Floats, sigma: float) -> Floats:
    z = (grid[:, None] - nodes) / sigma
    bells: Floats = np.exp(-0.5 * z * z) @ weights / (sigma * math.sqrt(2 * math.pi))
    return bells


def _width(sigma: float | None, span: float, steps: int, size: float) -> float:
    if sigma is None:
        # a spectrum of one point has no range
        return max(span / steps, 1e-3 * size) or 1.0
    if not 0 < sigma < math.inf:
        raise UsageError(f"sigma must be positive and finite, got {sigma!r}.")
    return float(sigma)


def _padded(values: Floats, length: int) -> Floats:
    return np.pad(values, (0, length - len(values)), constant_values=np.nan)
