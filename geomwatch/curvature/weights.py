"""What micro-batches count for in the loss that they are parts of: told from losses or gradients.

A mean over items, over unmasked tokens, a sum, or a mean weighted in a way of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from geomwatch.curvature.batches import parts

IGNORED = -100  # torch's ignore_index, which language models have on labels that don't count
_BUCKETS = 1024  # of a sketch: far more than micro-batches
_SEED = 0x67656F6D  # of their signs
_LEAST = 4  # entries of a sketch for each weight that is solved for


def count_tokens(batch: Any) -> float | None:
    """Count the labels that are not ignored, or what attention masks let pass; None without any."""
    known = [(path, t) for path, t in parts(batch) if isinstance(t, Tensor) and not t.is_nested]
    labels = [t for _, t in known if t.dtype == torch.int64 and bool((t == IGNORED).any())]
    if labels:
        return float(sum((t != IGNORED).sum() for t in labels))
    masks = [t for path, t in known if path and "mask" in str(path[-1]).lower() and t.ndim > 1]
    return float((masks[0] != 0).sum()) if masks else None


def count_shifted_tokens(batch: Any) -> float | None:
    """Count them where the first of each row is no label, as causal language models have it."""
    known = [t for t in (p for _, p in parts(batch)) if isinstance(t, Tensor) and t.ndim > 1]
    labels = [t for t in known if t.dtype == torch.int64 and bool((t == IGNORED).any())]
    return float(sum((t[..., 1:] != IGNORED).sum() for t in labels)) if labels else None


RULES: dict[str, Callable[[Any], float | None]] = {
    "labels that count": count_tokens,
    "labels that count, but for the first": count_shifted_tokens,
}


def sketch_of(like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a linear map of vectors (D,) to short ones, by which sums of them can be compared.

    A count sketch (Charikar et al. 2002): entries are added up in buckets, with random signs.
    """
    signs = torch.empty(like.numel(), dtype=torch.float32, device="cpu")
    signs.bernoulli_(0.5, generator=torch.Generator().manual_seed(_SEED)).mul_(2).sub_(1)
    signs = signs.to(like)

    def sketch(vector: Tensor) -> Tensor:
        if vector.numel() <= _BUCKETS:
            return vector.to("cpu", torch.float64)
        signed = vector * signs
        whole = signed.numel() // _BUCKETS * _BUCKETS
        short = signed[:whole].view(-1, _BUCKETS).sum(0)
        short[: signed.numel() - whole] += signed[whole:]
        return short.to("cpu", torch.float64)

    return sketch


def solve(sketches: Sequence[Tensor], whole: Tensor) -> tuple[list[float], float]:
    """Return the weights that make up `whole` from its parts, and what is left of it, relative."""
    matrix = torch.stack(list(sketches), 1)
    if matrix.shape[0] < _LEAST * matrix.shape[1]:
        return [], math.inf
    found = torch.linalg.lstsq(matrix, whole[:, None], driver="gelsd").solution[:, 0]
    return found.tolist(), residual(sketches, whole, found.tolist())


def residual(sketches: Sequence[Tensor], whole: Tensor, weights: Sequence[float]) -> float:
    """Return what a multiple of a weighted sum leaves of `whole`, relative to it."""
    total = torch.zeros_like(whole)
    for weight, part in zip(weights, sketches, strict=True):
        total += weight * part
    along = float(total @ whole / (total @ total).clamp_min(torch.finfo(total.dtype).tiny))
    return float((whole - along * total).norm() / whole.norm().clamp_min(1e-300))
