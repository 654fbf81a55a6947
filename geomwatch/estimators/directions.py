"""Random directions in weight space that are as long as the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from geomwatch.vectors.layout import Layout


def filter_normalised(layout: Layout, rng: torch.Generator) -> Tensor:
    """Draw a Gaussian direction whose filters are as long as those of the weights.

    A filter is what belongs to one index of dimension 0; tensors of one dimension (biases,
    normalisation scales) are left where they are (Li et al. 2018, "Visualizing the loss landscape
    of neural nets").
    """  # (D,)
    tiny = torch.finfo(layout.dtype).tiny
    drawn, weights = layout.filters(layout.normal(rng)), layout.filters(layout.values())
    pieces = []
    for p, noise, w in zip(layout.params, drawn, weights, strict=True):
        lengths = w.norm(dim=1, keepdim=True) * (p.dim() > 1)
        pieces.append(noise * (lengths / noise.norm(dim=1, keepdim=True).clamp_min(tiny)))
    return layout.flatten(pieces)
