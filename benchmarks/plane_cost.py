"""What a 25 x 25 plane of a ResNet-18 costs: forward passes and memory beside bare ones.

Writes docs/benchmarks/plane_cost.md. Takes some ten minutes on one core; `--points 5` one.
"""

from __future__ import annotations

import argparse
import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from geomwatch import landscape

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "plane_cost.md"
ITEMS = 256
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Cost:
    """Seconds of a plane and of as many bare forward passes, taken in turn."""

    plane: float
    bare: float

    @property
    def ratio(self) -> float:
        return self.plane / self.bare


def resnet18() -> nn.Module:
    """ResNet-18 for grey images: 11.2 million parameters."""
    config = ResNetConfig(
        num_channels=1,
        num_labels=10,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        downsample_in_first_stage=False,
    )
    return ResNetForImageClassification(config)


def images() -> tuple[Tensor, Tensor]:
    """Real digits, enlarged to 28 x 28."""
    inputs, targets = load_digits(return_X_y=True)
    small = torch.tensor(inputs[:ITEMS].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32)
    return F.interpolate(small, (28, 28), mode="bilinear"), torch.tensor(targets[:ITEMS])


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).logits, batch[1])


def bare_pass(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        loss_fn(model, batch)


def timed(points: int, mode: str) -> tuple[Cost, Cost]:
    """Return wall and CPU seconds; a bare pass follows each point, so both share the load."""
    model, batch = resnet18(), images()
    directions = [landscape.random_direction(model, seed=seed) for seed in (0, 1)]
    axis = np.linspace(-1, 1, points)
    clocks: list[Callable[[], float]] = [time.perf_counter, time.process_time]
    spent = [0.0, 0.0]

    def after_each(done: int, total: int) -> None:
        if done == 0:
            return
        before = [clock() for clock in clocks]
        bare_pass(model, batch)
        for i, clock in enumerate(clocks):
            spent[i] += clock() - before[i]
        print(f"\r{mode} mode: {done}/{total}", end="", flush=True)

    bare_pass(model, batch)  # the first one allocates, and chooses kernels
    start = [clock() for clock in clocks]
    landscape.plane(
        model, loss_fn, [batch], directions, alphas=axis, mode=mode, progress=after_each
    )
    print()
    wholes = [clock() - before for clock, before in zip(clocks, start, strict=True)]
    wall, processor = (Cost(w - s, s) for w, s in zip(wholes, spent, strict=True))
    return wall, processor


def peak_during(act: Callable[[], object]) -> float:
    """Return the peak of the resident memory while something runs, in MB."""
    gc.collect()
    CLEAR.write_text("5")  # resets the peak
    act()
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory(mode: str) -> tuple[float, float]:
    """Return what a plane needs beyond a bare pass with the directions there, and the weights."""
    model, batch = resnet18(), images()
    directions = [landscape.random_direction(model, seed=seed) for seed in (0, 1)]
    model.train(mode == "train")
    for _ in range(3):
        bare_pass(model, batch)
    bare = peak_during(lambda: bare_pass(model, batch))
    model.train()
    axis = np.linspace(-1, 1, 2)
    whole = peak_during(
        lambda: landscape.plane(model, loss_fn, [batch], directions, alphas=axis, mode=mode)
    )
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return whole - bare, weights


def report(points: int) -> str:
    rows = []
    for mode in ("train", "eval"):
        wall, processor = timed(points, mode)
        extra, weights = memory(mode)
        rows.append(
            f"| {mode} | {wall.plane:.0f} s | {wall.bare:.0f} s | {wall.ratio:.3f} "
            f"| {processor.ratio:.3f} | {extra:.1f} MB | {extra / weights:.2f} |"
        )
    table = "\n".join(rows)
    count = points * points
    return f"""# What a plane of a ResNet-18 costs

Written by `benchmarks/plane_cost.py`: {points} x {points} points on {ITEMS} images of 28 x 28,
one thread, torch {torch.__version__}, {platform.machine()}. After each point a bare forward pass
(`torch.no_grad()`, the same loss_fn and batch) is timed, so that both meet the same load of the
machine; the plane's time holds everything else, from isolating the model to the last point. The
model trains, so that mode "eval" has to switch it. Memory is the peak of the resident set beyond
that of a bare pass in the same mode with model, batch and the two directions in place; the weights
are {weights:.1f} MB.

| mode | plane | {count} bare passes | ratio | of CPU time | extra memory | copies of weights |
|---|---|---|---|---|---|---|
{table}

Wanted: a ratio of at most 1.1, and one extra copy of the weights beside the two directions.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=25, help="on each axis; 25 writes the page")
    points = parser.parse_args().points
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = report(points)
    print(text)
    if points == 25:
        OUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
