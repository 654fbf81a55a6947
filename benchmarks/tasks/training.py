"""One training run: what every benchmark on these tasks does, with a place to watch it from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

from tasks.sources import Batch
from tasks.task import Task

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "gd": torch.optim.SGD,
    "sgd": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
SCHEDULES = ("constant", "ramp", "warmup", "cosine", "onecycle", "jump")
_RAMP = 0.8  # of the run; then the peak is held
_WARM_UP = 0.1  # of the run
_START = 0.02  # of the peak, where a ramp and a warm-up begin
_JUMP = 0.5  # of the run, where a jump happens


@dataclass(frozen=True)
class Recipe:
    """How to train a task. `batch` None is full-batch; `jump` multiplies the rate half-way."""

    optimizer: str
    rate: float
    batch: int | None
    seed: int
    steps: int
    schedule: str = "constant"
    jump: float = 1.0

    @property
    def jump_step(self) -> int | None:
        """The first step taken at the rate after the jump."""
        return round(_JUMP * self.steps) if self.schedule == "jump" else None


@dataclass
class Trace:
    """What a training loop sees by itself, one entry a step; it ends early at a loss of NaN.

    `seconds` are those of zero_grad, forward, backward, optimizer and scheduler.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    seconds: float = 0.0
    norm_seconds: float = 0.0  # of the gradient norms, which only detectors need


@dataclass
class Loop:
    """A model about to be trained, for a monitor to hold on to."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None


Watcher = Callable[
    [int, Batch, Tensor], None
]  # step, its batch, its loss; before the step is taken


def prepare(task: Task, recipe: Recipe) -> Loop:
    """Build model, optimizer and scheduler."""
    model = task.build(recipe.seed)
    optimizer = OPTIMIZERS[recipe.optimizer](model.parameters(), lr=recipe.rate)
    return Loop(task, model, optimizer, scheduler(optimizer, recipe))


def train(loop: Loop, recipe: Recipe, watch: Watcher | None = None) -> Trace:
    """Train; dropout draws from the global generator, seeded here and put back afterwards."""
    trace = Trace()
    batches = loop.task.batches(recipe.seed, recipe.batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for step in range(recipe.steps):
            batch = next(batches)
            start = time.perf_counter()
            loop.optimizer.zero_grad()
            loss = loop.task.loss_fn(loop.model, batch)
            loss.backward()
            trace.seconds += time.perf_counter() - start
            _note(trace, loop, loss)
            if watch is not None:
                watch(step, batch, loss.detach())
            start = time.perf_counter()
            loop.optimizer.step()
            if loop.scheduler is not None:
                loop.scheduler.step()
            trace.seconds += time.perf_counter() - start
            if not math.isfinite(trace.losses[-1]):
                break
    return trace


def scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe) -> LRScheduler | None:
    """Return the torch scheduler of a recipe; a constant rate has none.

    Raises:
        ValueError: no such schedule.
    """
    steps = recipe.steps
    makers: dict[str, Callable[[], Any]] = {
        "constant": lambda: None,
        "ramp": lambda: LinearLR(optimizer, _START, total_iters=round(_RAMP * steps)),
        "warmup": lambda: LinearLR(optimizer, _START, total_iters=round(_WARM_UP * steps)),
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=steps),
        # one step more than taken: its last step() would otherwise be one too many
        "onecycle": lambda: OneCycleLR(optimizer, max_lr=recipe.rate, total_steps=steps + 1),
        "jump": lambda: MultiStepLR(optimizer, [recipe.jump_step], gamma=recipe.jump),
    }
    if recipe.schedule not in makers:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {recipe.schedule!r}")
    return makers[recipe.schedule]()


def tail(trace: Trace, items: int) -> float:
    """Return the mean loss of the last 20 steps, or of as many as hold 320 items.

    Infinite when the run has ended in a loss that is not finite.
    """
    count = max(20, math.ceil(320 / items))
    losses = trace.losses[-count:]
    return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def _note(trace: Trace, loop: Loop, loss: Tensor) -> None:
    start = time.perf_counter()
    gradients = [p.grad for p in loop.model.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
    trace.norm_seconds += time.perf_counter() - start
    trace.losses.append(loss.item())
    trace.grad_norms.append(norm)
    trace.rates.append(loop.optimizer.param_groups[0]["lr"])
