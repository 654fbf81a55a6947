"""How the rate of a run goes: torch's schedulers, and the same without a trace of their plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

SCHEDULES = ("constant", "ramp", "warmup", "cosine", "onecycle", "jump")
WARM_UP = 0.1  # of the run
START = 0.02  # of the peak, where a ramp and a warm-up begin
_RAMP = 0.8  # of the run; then the peak is held
_JUMP = 0.5  # of the run, where a jump happens


class Schedule(Protocol):
    """Sets the rates of the next step."""

    def step(self) -> None: ...


def jump_step(steps: int) -> int:
    """Return the first step taken at the rate after a jump."""
    return round(_JUMP * steps)


def scheduler(
    optimizer: Optimizer, name: str, steps: int, *, jump: float = 1.0
) -> LRScheduler | None:
    """Return the torch scheduler of an optimizer that is at its peak rate; a constant has none.

    Raises:
        ValueError: no such schedule.
    """
    defaults, peak = optimizer.defaults, optimizer.param_groups[0]["lr"]
    cycles = bool(defaults.get("momentum") or defaults.get("betas"))
    makers: dict[str, Callable[[], Any]] = {
        "constant": lambda: None,
        "ramp": lambda: LinearLR(optimizer, START, total_iters=round(_RAMP * steps)),
        "warmup": lambda: LinearLR(optimizer, START, total_iters=round(WARM_UP * steps)),
        "cosine": lambda: CosineAnnealingLR(optimizer, T_max=steps),
        # one step more than taken: its last step() would otherwise be one too many
        "onecycle": lambda: OneCycleLR(
            optimizer, max_lr=peak, total_steps=steps + 1, cycle_momentum=cycles
        ),
        "jump": lambda: MultiStepLR(optimizer, [jump_step(steps)], gamma=jump),
    }
    if name not in makers:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {name!r}")
    return makers[name]()


class Hidden:
    """A schedule written into the optimizer by hand at each step: it tells nothing of its plan."""

    def __init__(self, optimizer: Optimizer, name: str, steps: int, *, jump: float = 1.0) -> None:
        self._optimizer = optimizer
        peak = optimizer.param_groups[0]["lr"]
        self._own = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
        self._plan = scheduler(self._own, name, steps, jump=jump)
        self._write()

    def step(self) -> None:
        """Write the rate of the next step."""
        self._own.step()
        if self._plan is not None:
            self._plan.step()
        self._write()

    def _write(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._own.param_groups[0]["lr"]
