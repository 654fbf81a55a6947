"""Embedding rows that stand for padding: their gradient is zeroed on the way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from geomwatch.vectors.layout import Layout


def padding_mask(modules: Sequence[nn.Module], layout: Layout) -> Tensor | None:
    """Return 0 on the rows of embeddings that stand for padding, 1 elsewhere; None without any.

    The zeroed rows of the gradient leave a Jacobian that is not symmetric: double backward gives
    J'v, differences of gradients J v. With these rows left out on both sides all agree.
    """
    rows = {
        id(m.weight): m.padding_idx
        for m in modules
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }
    if not any(id(p) in rows for p in layout.params):
        return None
    mask = layout.spread([1.0] * len(layout.params))
    for p, filters in zip(layout.params, layout.filters(mask), strict=True):
        if id(p) in rows:
            filters[layout.rows(rows[id(p)], p)] = 0
    return mask
