"""One training run: what every benchmark on these tasks does, with a place to watch it from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tasks.optimizers import OPTIMIZERS
from tasks.schedules import Hidden, Schedule, jump_step, scheduler
from tasks.sources import Batch
from tasks.task import EVERY, Task


@dataclass(frozen=True)
class Recipe:
    """How to train a task.

    `batch` None is full-batch; `jump` multiplies the rate half-way; of a `hidden` schedule the
    optimizer does not show where it goes; `clip` is the largest norm of a gradient.
    """

    optimizer: str
    rate: float
    batch: int | None
    seed: int
    steps: int
    schedule: str = "constant"
    jump: float = 1.0
    hidden: bool = False
    clip: float | None = None

    @property
    def jump_step(self) -> int | None:
        """The first step taken at the rate after the jump."""
        return jump_step(self.steps) if self.schedule == "jump" else None


@dataclass
class Trace:
    """What a training loop sees by itself, one entry a step; it ends early at a loss of NaN.

    `rates` are the schedule's, `taken` those that the steps were taken at. `seconds` are those of
    zero_grad, forward, backward, optimizer and scheduler.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # every 10 steps, of tasks that have them
    seconds: float = 0.0
    norm_seconds: float = 0.0  # of the gradient norms, which only detectors need


@dataclass
class Loop:
    """A model about to be trained, for a monitor to hold on to."""

    task: Task
    recipe: Recipe
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Schedule | None

    def rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


# step, its batch, its loss; before the step is taken
Watcher = Callable[[int, Batch, Tensor], None]


def prepare(task: Task, recipe: Recipe) -> Loop:
    """Build model, optimizer and scheduler."""
    model = task.build(recipe.seed)
    optimizer = OPTIMIZERS[recipe.optimizer](task.parameters(model), lr=recipe.rate)
    plan = Hidden if recipe.hidden else scheduler
    schedule = plan(optimizer, recipe.schedule, recipe.steps, jump=recipe.jump)
    return Loop(task, recipe, model, optimizer, schedule)


def train(loop: Loop, watch: Watcher | None = None) -> Trace:
    """Train; dropout draws from the global generator, seeded here and put back afterwards."""
    recipe, trace = loop.recipe, Trace()
    batches = loop.task.batches(recipe.seed, recipe.batch)
    note = loop.optimizer.register_step_pre_hook(lambda *_: trace.taken.append(loop.rate()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        for step in range(recipe.steps):
            batch = _collected(loop, trace, next(batches), step)
            start = time.perf_counter()
            loop.optimizer.zero_grad()
            loss = loop.task.loss_fn(loop.model, batch)
            loss.backward()
            trace.seconds += time.perf_counter() - start
            _note(trace, loop, loss)
            if recipe.clip is not None:
                torch.nn.utils.clip_grad_norm_(loop.parameters(), recipe.clip)
            if watch is not None:
                watch(step, batch, loss.detach())
            trace.seconds += _step(loop)
            if not math.isfinite(trace.losses[-1]):
                break
    note.remove()
    return trace


def tail(trace: Trace, items: int) -> float:
    """Return the mean loss of the last 20 steps, or of as many as hold 320 items.

    Of a task that has scores, their mean over the last 20 steps. Infinite when the run has ended in
    a loss that is not finite.
    """
    count = max(20, math.ceil(320 / items))
    if not all(map(math.isfinite, trace.losses[-count:])):
        return math.inf
    ends = trace.scores[-2:] or trace.losses[-count:]
    return math.fsum(ends) / len(ends)


def _collected(loop: Loop, trace: Trace, batch: Batch, step: int) -> Batch:
    """Score the model when it is time to, and let it make its batch."""
    task = loop.task
    if task.score is not None and step % EVERY == 0:
        trace.scores.append(task.score(loop.model))
    return task.collect(loop.model, batch) if task.collect is not None else batch


def _step(loop: Loop) -> float:
    start = time.perf_counter()
    loop.optimizer.step()
    if loop.scheduler is not None:
        loop.scheduler.step()
    return time.perf_counter() - start


def _note(trace: Trace, loop: Loop, loss: Tensor) -> None:
    start = time.perf_counter()
    gradients = [p.grad for p in loop.parameters() if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
    trace.norm_seconds += time.perf_counter() - start
    trace.losses.append(loss.item())
    trace.grad_norms.append(norm)
    trace.rates.append(loop.rate())
