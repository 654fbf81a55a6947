"""Curvature by layer: both numbers of the Hessian's diagonal block of each module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from geomwatch.estimators.hutchinson import Samples, mean_with_stderr
from geomwatch.estimators.lanczos import Operator, lanczos
from geomwatch.records import Estimate
from geomwatch.vectors.layout import Layout


def layer_lambda_max(
    hvp: Operator, layout: Layout, *, rng: torch.Generator, max_hvps: int = 10, tol: float = 1e-3
) -> dict[str, Estimate]:
    """Return the largest eigenvalue of each module's own block of H, in the layout's order.

    That of P H P, P the projection on the module's parameters, by Lanczos from noise. In units of
    loss / weight^2. None exceeds lambda_max of the whole; where one comes close to it, that module
    carries the stiffest direction. The error is the Ritz residual. Costs up to `max_hvps` HVPs a
    module, fewer where it converges to `tol` or has fewer parameters: for slow probes.
    """
    found = {}
    for module, indices in _members(layout).items():
        block = _Block(layout, indices)
        start = block.cut(layout.normal(rng))
        s = lanczos(block.operator(hvp), start, max_hvps=max_hvps, top=1, tol=tol)
        found[module] = Estimate(s.values[0], s.residuals[0], "residual", hvps=s.hvps)
    return found


def layer_trace(samples: Samples, layout: Layout) -> dict[str, Estimate]:
    """Return the trace of each module's own block of H, in the layout's order.

    z'Hz of the Hutchinson samples summed over the module's coordinates alone: z_i H_ij z_j with
    i in the module is unbiased for the trace of its block, as the terms between modules have mean
    zero, and all modules add up to the trace's own estimate. In units of loss / weight^2. The
    error is the standard error of the mean. No HVPs beyond those of the trace.

    Raises:
        ValueError: fewer than two samples have no standard error.
    """
    m = len(samples.quadratic)
    return {
        module: mean_with_stderr([sum(row[i] for i in indices) for row in samples.parts], hvps=m)
        for module, indices in _members(layout).items()
    }


class _Block:
    """Vectors of a module's parameters only: the Krylov basis is as small as the module."""

    def __init__(self, layout: Layout, indices: list[int]) -> None:
        self._indices = indices
        self._sizes = layout.sizes

    def cut(self, vector: Tensor) -> Tensor:
        """Return the module's part of a vector, (D,) -> (n,)."""
        pieces = vector.split(self._sizes)
        return torch.cat([pieces[i] for i in self._indices])

    def operator(self, hvp: Operator) -> Callable[[Tensor], Tensor]:
        """Return x -> the module's part of H x, x zero elsewhere, (n,) -> (n,)."""

        def apply(x: Tensor) -> Tensor:
            whole = x.new_zeros(sum(self._sizes))
            places = whole.split(self._sizes)
            for i, piece in zip(
                self._indices, x.split([self._sizes[i] for i in self._indices]), strict=True
            ):
                places[i].copy_(piece)
            return self.cut(hvp(whole))

        return apply


def _members(layout: Layout) -> dict[str, list[int]]:
    """Which parameters each module holds itself."""
    members: dict[str, list[int]] = {}
    for i, name in enumerate(layout.names):
        members.setdefault(name.rpartition(".")[0] or name, []).append(i)
    return members
