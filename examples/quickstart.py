"""Watch a net learn real digits, at a healthy learning rate and at one that is ramped too far.

Run it with `make demo`, in less than a minute. It says when geomwatch warned and when the loss blew
up, and leaves a report of each run, a picture and the log in runs/quickstart/.
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
from geomwatch.report.page import write_page

OUT = Path("runs/quickstart")
BATCH = 64
loss_fn = geomwatch.supervised(F.cross_entropy)

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
        monitor = geomwatch.Monitor(model, loss_fn, optimizer, sinks=records)
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


def compare(name: str, build: Callable[[], nn.Module], rate: Rate, steps: int) -> tuple[Run, bool]:
    """Train twice, without and with the monitor; tell whether it left no trace."""
    bare = train(name, build, rate, steps, watch=False)
    watched = train(name, build, rate, steps, watch=True)
    same = all(torch.equal(a, b) for a, b in zip(bare.weights, watched.weights, strict=True))
    return watched, same


def draw(runs: list[Run], path: Path) -> None:
    """Draw loss and margins, one column for each run."""
    figure, axes = plt.subplots(
        2, len(runs), figsize=(5.2 * len(runs), 5.6), sharex="col", sharey="row"
    )
    for column, run in zip(axes.T, runs, strict=True):
        draw_run(run, column)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("margin / its limit")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_run(run: Run, axes: list[plt.Axes]) -> None:
    """Draw one run into two axes: what it lost, and what warned."""
    assert run.monitor is not None
    looks = [look for look in run.monitor.looks if look.limit]
    shares = [(k.gradient_margin.value or math.nan) / (k.limit or 1.0) for k in looks]
    loss, margin = axes
    loss.plot(run.losses, color="#0072B2", lw=1)
    loss.set_title(run.name)
    loss.set_yscale("log")
    margin.plot([k.step for k in looks], shares, "o-", color="#0072B2", ms=3, lw=1)
    margin.axhline(1, color="#C0143C", ls="--", lw=1.5)
    margin.text(0, 1.15, "the limit", color="#C0143C", fontsize=8)
    margin.set(xlabel="optimizer step", yscale="log", ylim=(1e-3, 30))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        mark(ax, run.warned, "#8A5A00", ":", "geomwatch warns")
        mark(ax, run.blow_up, "#000000", "-", "the loss blows up")
    if run.warned is not None:
        loss.legend(fontsize=8, frameon=False)


def mark(ax: plt.Axes, step: int | None, color: str, line: str, label: str) -> None:
    """Mark a step with a vertical line."""
    if step is not None:
        ax.axvline(step, color=color, lw=1.5, ls=line, label=f"{label} (step {step})")


def summarize(run: Run, same: bool) -> None:
    """Say when geomwatch warned, when the loss blew up, and what watching took."""
    assert run.monitor is not None
    trace = "bit for bit as without it" if same else "NOT as without it"
    say(f"{run.name}: {len(run.losses)} steps, last loss {run.losses[-1]:.3f}; trained {trace}")
    loud = [a for a in run.monitor.alerts if a.severity != "info"]
    if loud:
        first, _, details = loud[0].message.partition("\n")
        say(f"  step {loud[0].step}, {loud[0].severity}: {first}")
        say(f"  {details}")
    else:
        say("  no warning")
    if run.warned is not None and run.blow_up is not None:
        lead = run.blow_up - run.warned
        say(f"  the loss blew up at step {run.blow_up}, {lead} steps after this first warning")
    seconds = run.monitor.seconds
    say(f"  watching took {seconds:.1f} s, 2 % of a training of {seconds / 0.02:.0f} s or more")


def say(line: str) -> None:
    """Print a line."""
    print(line, flush=True)


def main() -> None:
    """Train, watch, draw, summarize."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of each run, at most")
    steps = parser.parse_args().steps
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    log = OUT / "log.txt"
    logging.basicConfig(filename=log, level=logging.INFO, format="%(levelname)-8s %(message)s")
    torch.set_num_threads(1)
    runs = []
    for name, rate in (("healthy", constant(0.05)), ("ramped", ramp(0.02, 1.02))):
        run, same = compare(name, mlp, rate, steps)
        summarize(run, same)
        write_page(geomwatch.read(OUT / f"{name}.jsonl"), OUT / f"{name}.html", title=name)
        runs.append(run)
    draw(runs, OUT / "quickstart.png")
    say(f"report: {(OUT / 'ramped.html').resolve()}")
    say(f"beside it healthy.html, quickstart.png and log.txt, all of {OUT}")


if __name__ == "__main__":
    main()
