"""Find the weights whose scale the loss does not see, such as those before a BatchNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.vectors.layout import Layout, whole

_LARGEST_COSINE = 1e-3
_TESTS = 6  # by sentinels and probes, after which probes alone go on testing


class ScaleInvariance(Resumable):
    """Remembers which tensors have passed the Euler test on every gradient so far.

    If L does not change when the filter w_r (one output channel) is scaled, Euler's theorem gives
    w_r . g_r = 0. A tensor of two or more dimensions passes when the root mean square over its
    filters of w_r . g_r / (|w_r| |g_r|) is below 1e-3; for a filter of n weights that is not
    invariant it is about 1 / sqrt(n). Tested per filter, because one cosine over a whole matrix
    of a million weights falls below 1e-3 by chance. A tensor that fails once is out for good. A
    tensor that is zero, or whose gradient is zero or not finite, neither passes nor fails: the
    convolutions of a ResNet whose last BatchNorms start at zero are decided a step later.

    Such tensors have a curvature that grows as their norm shrinks, without any effect on the
    stability of the function they compute; the margin leaves them out.
    """

    _failed: Kept[set[str]]
    _tests: Kept[int]

    def __init__(self) -> None:
        self._failed, self._tests = set(), 0

    @property
    def is_young(self) -> bool:
        """Whether a few more gradients may tell what the first could not."""
        return self._tests < _TESTS

    def update(self, layout: Layout, gradient: Tensor) -> frozenset[str]:
        """Test one more gradient, (D,), and return the names that have passed every time."""
        self._tests += 1
        passed: set[str] = set()
        for name, w, g in zip(layout.names, layout.params, layout.unflatten(gradient), strict=True):
            if w.dim() < 2 or name in self._failed:
                continue
            cosine = _cosine(whole(w).detach(), whole(g))
            if cosine is not None:
                (passed if cosine < _LARGEST_COSINE else self._failed).add(name)
        return frozenset(passed)


def _cosine(w: Tensor, g: Tensor) -> float | None:
    """Root mean square of the cosines of filters and gradients; None where there are none.

    Filters lie along dimension 0, along dimension 1 in transposed convolutions.
    """
    found = [_cosine_along(w.transpose(0, d), g.transpose(0, d)) for d in (0, 1)]
    return min((c for c in found if c is not None), default=None)


def _cosine_along(w: Tensor, g: Tensor) -> float | None:
    if w.is_complex():
        w, g = torch.view_as_real(w), torch.view_as_real(g)
    # As a product of bfloat16 the cosine would be all rounding.
    wide = torch.promote_types(w.dtype, torch.float32)
    w, g = w.flatten(1).to(wide), g.flatten(1).to(wide)
    norms = w.norm(dim=1) * g.norm(dim=1)
    alive = norms > 0
    if not bool(torch.isfinite(norms).all()) or not bool(alive.any()):
        return None
    cosines = (w * g).sum(1)[alive] / norms[alive]
    return float(cosines.square().mean().sqrt())
