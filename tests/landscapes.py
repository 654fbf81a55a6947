"""One result of each kind that geomwatch.landscape gives."""

from __future__ import annotations

import torch
from problems import Quadratic, quadratic_loss, wishart

from geomwatch import landscape

ONES = [torch.ones(2, dtype=torch.float64)]


def every_kind() -> dict[str, object]:
    model = Quadratic(wishart(10, seed=1))
    rng = torch.Generator().manual_seed(0)
    states = [
        {**model.state_dict(), "w": torch.randn(10, generator=rng, dtype=torch.float64)}
        for _ in range(4)
    ]
    directions = landscape.hessian_directions(model, quadratic_loss, ONES)
    grid = {"alphas": [-1, 0, 1]}
    return {
        "slice": landscape.slice_1d(model, quadratic_loss, ONES, directions[0], **grid),
        "plane": landscape.plane(model, quadratic_loss, ONES, directions, **grid),
        "trajectory": landscape.trajectory(model, states, landscape.pca_directions(model, states)),
        "barrier": landscape.barrier(model, states[0], states[1], quadratic_loss, ONES, points=5),
        "density": landscape.density(model, quadratic_loss, ONES, steps=5),
    }
