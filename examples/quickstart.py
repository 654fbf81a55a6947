"""Watch two nets learn real digits, first at a healthy learning rate, then ramped until it breaks.

Run it with `make demo`. It takes about a minute on one core, prints what geomwatch logs in any
training, and leaves its records and a picture in runs/quickstart/.
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import geomwatch

OUT = Path("runs/quickstart")
BATCH = 64
loss_fn = geomwatch.supervised(F.cross_entropy)
logger = logging.getLogger("quickstart")

Rate = Callable[[int], float]


@dataclass
class Run:
    """What is left of one training."""

    name: str
    losses: list[float]
    weights: list[Tensor]
    monitor: geomwatch.Monitor | None = None
    rates: list[float] = field(default_factory=list)

    @property
    def blow_up(self) -> int | None:
        """The first step at which the loss is back above where it started."""
        start = self.losses[0]
        after = enumerate(self.losses[10:], start=10)
        return next((t for t, x in after if not math.isfinite(x) or x > start + 0.5), None)

    @property
    def warned(self) -> int | None:
        """The step of the first alert at or above warning."""
        assert self.monitor is not None
        loud = (a.step for a in self.monitor.alerts if a.severity != "info")
        return next(loud, None)


def mlp() -> nn.Module:
    """A fully connected net of 17,226 parameters."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def convnet() -> nn.Module:
    """A convolutional net of 19,738 parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def constant(rate: float) -> Rate:
    """A learning rate that stays."""
    return lambda step: rate


def ramp(start: float, growth: float) -> Rate:
    """A learning rate that grows a little with each step."""
    return lambda step: start * growth**step


def train(name: str, build: Callable[[], nn.Module], rate: Rate, steps: int, *, watch: bool) -> Run:
    """Train on the digits, with or without a monitor; the same seed gives the same run."""
    torch.manual_seed(0)
    inputs, targets = digits()
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate(0), momentum=0.9)
    monitor = None
    if watch:
        records = OUT / f"{name.replace(' ', '_')}.jsonl"
        # 2 % of a run this short pay for its first probe alone; here curves are to be drawn.
        monitor = geomwatch.Monitor(model, loss_fn, optimizer, budget=None, sinks=records)
    losses, rates, blown = [], [], 0
    for step in range(steps):
        batch = pick(inputs, targets)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch, loss=loss.detach())
        optimizer.step()
        losses.append(loss.item())
        rates.append(rate(step))
        blown += step > 10 and losses[-1] > losses[0] + 0.5
        if blown > 5 or not math.isfinite(losses[-1]):
            break
    if monitor is not None:
        monitor.close()
    weights = [p.detach().clone() for p in model.parameters()]
    return Run(name, losses, weights, monitor, rates)


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 real 8x8 digits of scikit-learn."""
    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)


def pick(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a random batch."""
    chosen = torch.randint(0, len(inputs), (BATCH,))
    return inputs[chosen], targets[chosen]


def compare(name: str, build: Callable[[], nn.Module], rate: Rate, steps: int) -> Run:
    """Train twice, without and with the monitor, and check that it left no trace."""
    logger.info("--- %s", name)
    bare = train(name, build, rate, steps, watch=False)
    watched = train(name, build, rate, steps, watch=True)
    same = all(torch.equal(a, b) for a, b in zip(bare.weights, watched.weights, strict=True))
    assert watched.monitor is not None
    logger.info(
        "%s: %d steps, %d probes; weights %s",
        name,
        len(watched.losses),
        len(watched.monitor.history),
        "bit-identical to the run without it" if same else "DIFFER from the run without it",
    )
    return watched


def draw(runs: list[Run], path: Path) -> None:
    """Draw loss, curvature against its limit, and margin, one column for each run."""
    figure, axes = plt.subplots(
        3, len(runs), figsize=(5.2 * len(runs), 8), sharex="col", layout="constrained"
    )
    for column, run in zip(axes.T, runs, strict=True):
        draw_run(run, column)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("λ_max")
    axes[2, 0].set_ylabel("stability margin")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_run(run: Run, axes: list[plt.Axes]) -> None:
    """Draw one run into three axes."""
    assert run.monitor is not None
    history = run.monitor.history
    steps = [r.step for r in history]
    margins = [r["stability_margin"].value or math.nan for r in history]
    top = [r["lambda_max"].value or math.nan for r in history]
    limits = [2 * (1 + 0.9) / r.lr[0] for r in history]
    loss, curvature, margin = axes
    loss.plot(run.losses, color="#0072B2", lw=1)
    loss.set_title(run.name)
    curvature.plot(steps, top, "o-", color="#0072B2", ms=3, lw=1, label="λ_max")
    curvature.plot(steps, limits, "--", color="#D55E00", lw=1.5, label="limit 2(1+0.9)/lr")
    margin.plot(steps, margins, "o-", color="#0072B2", ms=3, lw=1, label="margin")
    margin.axhline(1, color="#D55E00", ls="--", lw=1.5, label="unstable")
    margin.set_xlabel("optimizer step")
    for ax in axes:
        ax.set_yscale("log")
        ax.spines[["top", "right"]].set_visible(False)
        mark(ax, run.warned, "#E69F00", "geomwatch warns")
        mark(ax, run.blow_up, "#000000", "loss blows up")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)


def mark(ax: plt.Axes, step: int | None, color: str, label: str) -> None:
    """Mark a step with a vertical line."""
    if step is not None:
        ax.axvline(step, color=color, lw=1.5, ls=":", label=f"{label} (step {step})")


def summarize(run: Run) -> None:
    """Say when geomwatch warned and when the loss blew up."""
    if run.warned is None and run.blow_up is None:
        logger.info("%s: no warning, and the loss ended at %.3f", run.name, run.losses[-1])
        return
    lead = "" if None in (run.warned, run.blow_up) else f", {run.blow_up - run.warned} steps ahead"
    logger.info(
        "%s: geomwatch warned at step %s, the loss blew up at step %s%s",
        run.name,
        run.warned,
        run.blow_up,
        lead,
    )


def main() -> None:
    """Train, watch, draw, summarize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each run, at most")
    steps = parser.parse_args().steps
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)-8s %(message)s", datefmt="%H:%M:%S"
    )
    torch.set_num_threads(1)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    runs = [
        compare("mlp healthy", mlp, constant(0.05), steps),
        compare("convnet healthy", convnet, constant(0.02), steps),
        compare("mlp ramped", mlp, ramp(0.02, 1.02), steps),
        compare("convnet ramped", convnet, ramp(0.01, 1.02), steps),
    ]
    draw(runs, OUT / "quickstart.png")
    logger.info("--- summary")
    for run in runs:
        summarize(run)
    logger.info("records and picture: %s", OUT.resolve())


if __name__ == "__main__":
    main()
