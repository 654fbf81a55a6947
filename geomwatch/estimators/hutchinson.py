"""Trace of the Hessian and of its square from random HVPs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from geomwatch.estimators.lanczos import Operator
from geomwatch.records import Estimate
from geomwatch.vectors import Layout


@dataclass(frozen=True, slots=True)
class Samples:
    """What m random vectors z saw of H: z'Hz, whose mean is tr(H), and ||Hz||^2, tr(H^2)."""

    quadratic: tuple[float, ...]
    squared: tuple[float, ...]


def hutchinson(hvp: Operator, layout: Layout, *, samples: int, rng: torch.Generator) -> Samples:
    """Draw Rademacher vectors z and return z'Hz and ||Hz||^2 for each.

    For z with independent +-1 entries E[z'Hz] = tr(H) and E[||Hz||^2] = tr(H^2), whatever H is
    (Hutchinson 1989); the variance of z'Hz is 2 sum_{i != j} H_ij^2. One HVP per sample.
    """
    quadratic, squared = [], []
    for _ in range(samples):
        z = layout.rademacher(rng)
        hz = hvp(z)
        quadratic.append(z @ hz)
        squared.append(hz @ hz)
    # One transfer for all: a sync per sample would stall a GPU.
    both = torch.stack(quadratic + squared).tolist()
    return Samples(tuple(both[:samples]), tuple(both[samples:]))


def mean_with_stderr(values: Sequence[float], *, hvps: int) -> Estimate:
    """Return the mean of independent samples and its standard error s / sqrt(m).

    For few samples the 95 % interval is mean +- t stderr with Student's t at m - 1 degrees of
    freedom: two standard errors cover only 86 % at m = 4.

    Raises:
        ValueError: fewer than two samples have no standard error.
    """
    if len(values) < 2:
        raise ValueError(f"samples must be >= 2 to give a standard error, got {len(values)}")
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), error, "stderr", hvps=hvps)
