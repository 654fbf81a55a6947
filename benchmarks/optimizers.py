"""What geomwatch makes of each optimizer: a table, optimizer by what is recognised and announced.

    python benchmarks/optimizers.py            # the rows that are missing, then the page
    python benchmarks/optimizers.py --anew     # all of them
    python benchmarks/optimizers.py --report   # the page, from the rows there are

A small tanh net on made data. The healthy rate of each optimizer stands below; its diverging rate
is the smallest of 10, 30, ... 10,000 times that at which a run without geomwatch ends above its
first loss. What is not installed is left out and named. A row takes some ten seconds; the page is
written after each.
"""

from __future__ import annotations

import importlib
import logging
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.version import written_by
from torch import Tensor, nn

import geomwatch
from geomwatch.controllers import LearningRateCap

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks" / "optimizers.md"
STEPS, SEEDS, LAST = 60, 3, 10
FACTORS = (10.0, 30.0, 100.0, 300.0, 1000.0, 10_000.0)
FAILED = 3.0  # times the first loss: the run has failed

# class, healthy rate, options
OPTIMIZERS: list[tuple[str, float, dict[str, Any]]] = [
    ("torch.optim.SGD", 0.1, {}),
    ("torch.optim.SGD", 0.05, {"momentum": 0.9}),
    ("torch.optim.SGD", 0.05, {"momentum": 0.9, "nesterov": True}),
    ("torch.optim.ASGD", 0.1, {}),
    ("torch.optim.Adam", 0.01, {}),
    ("torch.optim.AdamW", 0.01, {}),
    ("torch.optim.Adam", 0.01, {"amsgrad": True}),
    ("torch.optim.Adamax", 0.01, {}),
    ("torch.optim.NAdam", 0.01, {}),
    ("torch.optim.RAdam", 0.01, {}),
    ("torch.optim.RMSprop", 0.003, {}),
    ("torch.optim.Adagrad", 0.03, {}),
    ("torch.optim.Adadelta", 1.0, {}),
    ("torch.optim.Adafactor", 0.05, {}),
    ("torch.optim.Rprop", 0.001, {}),
    ("transformers.Adafactor", 0.01, {"relative_step": False, "scale_parameter": False}),
    ("schedulefree.SGDScheduleFree", 1.0, {}),
    ("schedulefree.AdamWScheduleFree", 0.01, {}),
    ("prodigyopt.Prodigy", 1.0, {}),
    ("dadaptation.DAdaptAdam", 1.0, {}),
    ("lion_pytorch.Lion", 0.001, {}),
    ("optimi.AdamW", 0.01, {}),
    ("optimi.StableAdamW", 0.01, {}),
    ("pytorch_optimizer.AdEMAMix", 0.003, {}),
    ("pytorch_optimizer.AdaBelief", 0.01, {"rectify": False}),
    ("pytorch_optimizer.Lion", 0.001, {}),
    ("pytorch_optimizer.SignSGD", 0.001, {}),
    ("pytorch_optimizer.Lamb", 0.01, {}),
    ("pytorch_optimizer.LARS", 0.5, {}),
    ("pytorch_optimizer.SOAP", 0.003, {}),
    ("pytorch_optimizer.Shampoo", 0.1, {}),
    ("pytorch_optimizer.AdamP", 0.01, {}),
    ("pytorch_optimizer.Adan", 0.01, {}),
    ("pytorch_optimizer.DiffGrad", 0.01, {}),
    ("pytorch_optimizer.Yogi", 0.01, {}),
    ("pytorch_optimizer.StableAdamW", 0.01, {}),
    ("pytorch_optimizer.Tiger", 0.001, {}),
    ("pytorch_optimizer.ADOPT", 0.01, {}),
    ("pytorch_optimizer.CAME", 0.003, {}),
    ("pytorch_optimizer.Grams", 0.01, {}),
]

Make = Callable[[nn.Module, float], Any]
loss_fn = geomwatch.supervised(nn.CrossEntropyLoss())


@dataclass(frozen=True)
class Run:
    """The losses of a run, and what was said in it."""

    losses: list[float]
    monitor: geomwatch.Monitor | None

    @property
    def trains(self) -> bool:
        """Whether its last losses are below its first."""
        last = statistics.fmean(self.losses[-LAST:])
        return math.isfinite(last) and last < self.losses[0]

    @property
    def failed(self) -> int:
        """The step at which it has failed, its end if it never clearly did."""
        high = FAILED * self.losses[0]
        return next((t for t, loss in enumerate(self.losses) if not loss <= high), STEPS)

    @property
    def first_word(self) -> int | None:
        """The step of the first warning."""
        alerts = [] if self.monitor is None else self.monitor.alerts
        return next((a.step for a in alerts if a.severity in ("warning", "critical")), None)


def data() -> tuple[Tensor, Tensor]:
    """Return four classes of 20 numbers each, drawn once."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(512, 20, generator=rng)
    return x, (x[:, :5].sum(1) > 0).long() + 2 * (x[:, 5:9].sum(1) > 0).long()


def train(make: Make, lr: float, seed: int, *, watch: bool = True, controllers: Any = ()) -> Run:
    """Train for some steps, watched or not."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )
    optimizer, (x, y) = make(model, lr), data()
    monitor = (
        geomwatch.Monitor(model, loss_fn, optimizer, controllers=controllers) if watch else None
    )
    losses = []
    for _ in range(STEPS):
        rows = torch.randint(0, len(x), (64,))
        batch = x[rows], y[rows]
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch, loss=loss.detach())
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, monitor)


def maker(place: str, options: dict[str, Any]) -> Make:
    """Return what builds an optimizer; ImportError where its library is not installed."""
    module, _, name = place.rpartition(".")
    cls = getattr(importlib.import_module(module), name)

    def make(model: nn.Module, lr: float) -> Any:
        optimizer = cls(model.parameters(), lr=lr, **options)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    return make


def row(place: str, lr: float, options: dict[str, Any]) -> str:
    """Return a line of the table."""
    make = maker(place, options)
    healthy = [train(make, lr, seed) for seed in range(SEEDS)]
    silent = sum(run.first_word is None for run in healthy)
    trained = sum(run.trains for run in healthy)
    high = next((lr * f for f in FACTORS if not train(make, lr * f, 0, watch=False).trains), None)
    announced = cap = "no rate diverges"
    if high is not None:
        runs = [train(make, high, seed) for seed in range(SEEDS)]
        lost = [run for run in runs if not run.trains]
        early = [r for r in lost if r.first_word is not None and r.first_word <= r.failed]
        announced = f"{len(early)} of {len(lost)}, at {high:g}"
        cap = _under_the_cap(make, high)
    cells = (
        name_of(place, options), f"{lr:g}", _recognised(healthy[0]), _bisected(place, healthy[0]),
        f"{silent} of {SEEDS}" + ("" if trained == SEEDS else f" ({trained} train)"),
        announced, cap,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _recognised(run: Run) -> str:
    assert run.monitor is not None
    margin = run.monitor.history[-1].estimates["stability_margin"]
    first = run.monitor.history[0].estimates["stability_margin"]
    if margin.status == "ok":
        return "by its class" if first.status == "ok" else "by its steps"
    return "steps of constant size" if margin.status == "directional" else "unknown"


def _bisected(place: str, run: Run) -> str:
    """Name the test that bisects its limit, if one does."""
    module, _, name = place.rpartition(".")
    if _recognised(run) != "by its class":
        return "-"
    for test in ("test_stability.py", "test_other_libraries.py"):
        text = (ROOT / "tests" / "stability" / test).read_text(encoding="utf-8")
        if f'"{place}"' in text or (module == "torch.optim" and f"optim.{name}," in text):
            return f"{test}"
    return "-"


def _under_the_cap(make: Make, lr: float) -> str:
    run = train(make, lr, 0, controllers=LearningRateCap())
    assert run.monitor is not None
    if any(a.effect == "abstains" for a in run.monitor.adjustments):
        return "abstains"
    return "rescues" if run.trains else "does not rescue"


def main() -> None:
    """Write the page."""
    logging.disable()
    torch.set_num_threads(1)
    rows = {} if "--anew" in sys.argv else rows_of_page()
    for place, lr, options in OPTIMIZERS if "--report" not in sys.argv else ():
        name = name_of(place, options)
        if name in rows:
            continue
        try:
            rows[name] = row(place, lr, options)
        except ImportError:  # its library is not installed
            continue
        print(rows[name], flush=True)
        write(rows)
    write(rows)


def write(rows: dict[str, str]) -> None:
    """Write the page from the rows there are, and name those that are missing."""
    names = [name_of(place, options) for place, _, options in OPTIMIZERS]
    there = "\n".join(rows[name] for name in names if name in rows)
    missing = ", ".join(name for name in names if name not in rows)
    left_out = f"Not run yet, or not installed: {missing}." if missing else ""
    written = written_by(Path(__file__).name)
    page = TEXT.format(rows=there, left_out=left_out, seeds=SEEDS, steps=STEPS, written=written)
    PAGE.write_text(page.rstrip() + "\n", encoding="utf-8")


def rows_of_page() -> dict[str, str]:
    """Return the rows that the page has, by their first cell."""
    lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    return {line.split("|")[1].strip(): line for line in lines if line.startswith("| `")}


def name_of(place: str, options: dict[str, Any]) -> str:
    """Return the first cell of a row."""
    return f"`{' '.join([place, *(f'{k}={v}' for k, v in options.items())])}`"


TEXT = """# Optimizers

{written} The last rows were run at that commit, others may be older.
What geomwatch makes of each optimizer, on a small tanh net (1,800 weights, four classes, batches
of 64, {steps} steps), with default rules.

- **recognised**: by its class, or by its first three steps; else "steps of constant size" (theory
  gives no limit) or "unknown".
- **bisected in**: the test that finds its steps to grow from 1 % above the limit on, and not from
  1 % below.
- **healthy, silent**: of {seeds} runs at the healthy rate, those without a warning.
- **diverging, announced**: of the runs that end above their first loss, at the smallest of 10, 30,
  100, 300, 1,000 and 10,000 times the healthy rate at which the first does, those warned of before
  their loss is three times the first.
- **cap**: `LearningRateCap` at that rate: the run trains after all, or it abstains.

| optimizer | rate | recognised | bisected in | healthy, silent | diverging, announced | cap |
|---|---|---|---|---|---|---|
{rows}

{left_out}"""


if __name__ == "__main__":
    main()
