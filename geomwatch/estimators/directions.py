"""Random directions in weight space that are as long as the weights themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from geomwatch.vectors import Layout


def filter_normalised(layout: Layout, rng: torch.Generator) -> Tensor:
    """Draw a Gaussian direction whose filters are as long as those of the weights.

    A filter is what belongs to one index of dimension 0; tensors of one dimension (biases,
    normalisation scales) are left where they are (Li et al. 2018, "Visualizing the loss landscape
    of neural nets").
    """  # (D,)
    noise = layout.normal(rng)
    pieces = []
    for p, piece in zip(
        layout.params, noise.split([p.numel() for p in layout.params]), strict=True
    ):
        if p.dim() < 2:
            pieces.append(torch.zeros_like(piece))
            continue
        drawn = piece.view(p.shape[0], -1)
        lengths = p.detach().reshape(p.shape[0], -1).to(drawn).norm(dim=1, keepdim=True)
        tiny = torch.finfo(drawn.dtype).tiny
        pieces.append(
            (drawn * (lengths / drawn.norm(dim=1, keepdim=True).clamp_min(tiny))).view(-1)
        )
    return torch.cat(pieces)
