"""Draw the landscape of two nets that learn real digits: slices, planes, barriers, spectra.

Takes about a minute on one core. Pictures and results go to runs/landscape/; what was interrupted
there is gone on with at the next start.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import geomwatch
from geomwatch import landscape

OUT = Path("runs/landscape")
loss_fn = geomwatch.supervised(F.cross_entropy)
logger = logging.getLogger("landscape")

Batch = tuple[Tensor, Tensor]


@dataclass
class Run:
    """A training: the trained net and its states on the way, the last one at the end."""

    model: nn.Module
    states: list[dict[str, Any]]


def mlp() -> nn.Module:
    """A fully connected net."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def convnet() -> nn.Module:
    """A convolutional net with BatchNorm."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def digits() -> Batch:
    """The 1,797 real 8x8 digits of scikit-learn."""
    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)


def train(build: Callable[[], nn.Module], data: Batch, *, seed: int, steps: int) -> Run:
    """Train with SGD, keeping a state every few steps."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    states = [copy.deepcopy(model.state_dict())]
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(data[0]), (64,))
        optimizer.zero_grad()
        loss_fn(model, (data[0][chosen], data[1][chosen])).backward()
        optimizer.step()
        if step % max(1, steps // 20) == 0:
            states.append(copy.deepcopy(model.state_dict()))
    return Run(model, states)


def look(name: str, first: Run, second: Run, batches: Sequence[Batch], points: int) -> list[object]:
    """Take all kinds of landscapes of a net and draw each of them."""
    model = first.model
    torch.manual_seed(0)
    kept = OUT / name / "partial"
    axis = np.linspace(-1, 1, points)
    v, u = (landscape.random_direction(model, seed=seed) for seed in (0, 1))
    line = landscape.slice_1d(model, loss_fn, batches, v)
    surface = landscape.plane(
        model, loss_fn, batches, (v, u), alphas=axis, resume=kept / "plane", progress=True
    )
    spectrum = landscape.density(model, loss_fn, batches, vectors=6, progress=True)
    ends = (first.states[-1], second.states[-1])
    straight = landscape.barrier(model, *ends, loss_fn, batches)
    aligned = landscape.barrier(model, *ends, loss_fn, batches, align=True)
    bent = landscape.barrier(
        model, *ends, loss_fn, batches, bend=landscape.Bending(steps=200, lr=1e-2)
    )
    figures = {
        "slice": landscape.plot_slice(line),
        "plane": landscape.plot_plane(surface),
        "surface": landscape.plot_surface(surface),
        "density": landscape.plot_density(spectrum),
        "barrier": landscape.plot_barrier(straight, aligned, bent),
        "trajectory": trajectory(first, batches, points),
    }
    for kind, figure in figures.items():
        figure.savefig(OUT / name / f"{kind}.png")
    results = {"slice": line, "plane": surface, "density": spectrum, "barrier": straight}
    for kind, result in results.items():
        landscape.save(result, OUT / name / kind)
    tell(name, line, spectrum, (straight, aligned, bent))
    return [line, surface, straight, aligned, bent, spectrum]


def trajectory(run: Run, batches: Sequence[Batch], points: int) -> Any:
    """Draw the way of a run on the plane that holds most of it."""
    directions = landscape.pca_directions(run.model, run.states)
    path = landscape.trajectory(run.model, run.states, directions)
    alphas, betas = landscape.grid_around(path, points=points)
    plane = landscape.plane(
        run.model, loss_fn, batches, directions, alphas=alphas, betas=betas, progress=True
    )
    return landscape.plot_plane(plane, path)


def tell(
    name: str,
    line: landscape.Slice,
    spectrum: landscape.Density,
    barriers: Sequence[landscape.Barrier],
) -> None:
    """Say in a few lines what the pictures show."""
    fit = landscape.polynomial_fit(line)
    logger.info(
        "%s: turns of the slice: %d; a parabola leaves %.1f %% of its range; trace %.1f ± %.1f, "
        "largest eigenvalues %s",
        name,
        fit.turns,
        100 * fit.share,
        spectrum.trace,
        spectrum.trace_error,
        ", ".join(f"{value:.3g}" for value in spectrum.exact[:3]),
    )
    for found in barriers:
        assert found.max_loss is not None
        assert found.height is not None
        logger.info(
            "%s: %s path%s: max loss %.3f at α = %.2f, height %.3f above its ends (%.3f, %.3f)",
            name,
            {"linear": "straight", "bezier": "bent"}[found.path],
            ", units aligned" if found.aligned else "",
            found.max_loss,
            found.argmax,
            found.height,
            found.loss_a,
            found.loss_b,
        )


def main() -> None:
    """Train two nets of each kind, look at them, and draw them side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150, help="of each training")
    parser.add_argument("--points", type=int, default=25, help="of a plane, on each axis")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    data = digits()
    batches = [(data[0][:512], data[1][:512])]
    nets = {}
    for name, build in (("MLP", mlp), ("convnet", convnet)):
        (OUT / name).mkdir(parents=True, exist_ok=True)
        runs = [train(build, data, seed=seed, steps=options.steps) for seed in (0, 1)]
        nets[name] = look(name, *runs, batches, options.points)
    landscape.plot_comparison(nets).savefig(OUT / "comparison.png")
    logger.info("pictures and results: %s", OUT.resolve())


if __name__ == "__main__":
    main()
