"""Raises an error at the n-th line of geomwatch, or allocation, and compares what it leaves behind.

Everything that a probe could disturb is compared bit by bit with what it was before: see `World`.
"""

from __future__ import annotations

import itertools
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

import geomwatch
from geomwatch.isolation import undo

_STEP = geomwatch.Monitor.step.__code__
PACKAGE = str(Path(geomwatch.__file__).parent)
KINDS = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, signal.SIGINT)
LARGE = 100  # elements: more than a batch here, and fewer than the smallest model

# --- where a fault strikes -------------------------------------------------------------------


class Lines:
    """Calls `at` with the number of each line of geomwatch that is executed inside."""

    def __init__(self, at: Callable[[int, FrameType], None]) -> None:
        self._at, self.count = at, 0

    def __enter__(self) -> Lines:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and not _is_outside(frame):
            self.count += 1
            self._at(self.count, frame)
        return self._trace


def _is_outside(frame: FrameType) -> bool:
    """Tell whether a line is one of `Monitor.step` itself: some stand outside of its guard."""
    return frame.f_code is _STEP


class Allocations(TorchDispatchMode):
    """Calls `at` with the number of each new tensor as large as the model."""

    def __init__(self, at: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types there
        self._at, self.count = at, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = not any(r.alias_info for r in func._schema.returns)
        if is_new and isinstance(result, Tensor) and result.numel() >= LARGE:
            self.count += 1
            self._at(self.count)
        return result


# --- what must be as before ------------------------------------------------------------------


class World:
    """All that a probe could disturb, copied and by identity."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._look()

    def changes(self) -> list[str]:
        """Name what is not as it was."""
        now = self._look()
        return [name for name, value in self._before.items() if not _same(value, now[name])]

    def _look(self) -> dict[str, Any]:
        modules = list(self._model.modules())
        params = list(self._model.parameters())
        tensors = [*params, *self._model.buffers()]
        hooks = [
            [list(h) for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
            for m in modules
        ]
        return {
            "weights and buffers": [t.detach().clone() for t in tensors],
            "their objects": [id(t) for t in tensors],
            "gradients": [None if p.grad is None else p.grad.clone() for p in params],
            "their gradients' objects": [id(p.grad) for p in params],
            "requires_grad": [p.requires_grad for p in params],
            "modes": [m.training for m in modules],
            "hooks": [*hooks, [len(p._backward_hooks or ()) for p in params]],
            "random states": [torch.get_rng_state(), list(np.random.get_state())],
            "Python's random state": random.getstate(),
            "switches": _switches(),
            "patches": [vars(owner).get(name) for owner, name in _PATCHED],
            "signal handlers": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
            "modes of torch": torch._C._len_torch_dispatch_stack(),
            "what is to be undone": len(undo._THREAD.steps),
        }


_PATCHED: list[tuple[Any, str]] = [
    (torch.autocast, "__enter__"),
    (CheckpointFunction, "apply"),
    (_SpectralNorm, "_power_method"),
    (torch, "_weight_norm"),
    (nn.SyncBatchNorm, "forward"),
]


def _switches() -> list[object]:
    read = torch._C._get_fp32_precision_getter
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        *(read("cuda", kind) for kind in ("matmul", "conv", "rnn")),
        torch.get_float32_matmul_precision(),
        geomwatch.is_probing(),
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor | np.ndarray) and b is not None:
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# --- what came of it ---------------------------------------------------------------------------


@dataclass
class Situation:
    """What is called with a fault: `call` on what the last `prepare` has returned the model of."""

    prepare: Callable[[], nn.Module]
    call: Callable[[], object]
    stops: bool = False  # an error may stop it: it is no part of a training run


@dataclass
class Tally:
    """What came of the faults of a situation."""

    injected: int = 0
    survived: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def note(self, what: str, problems: Sequence[str]) -> None:
        """Count a fault that struck, with what it has left behind."""
        self.injected += 1
        self.survived += not problems
        self.failures.update(f"{what}: {problem}" for problem in problems)

    def __add__(self, other: Tally) -> Tally:
        injected, survived = self.injected + other.injected, self.survived + other.survived
        return Tally(injected, survived, self.failures + other.failures)

    def __str__(self) -> str:
        return f"{self.survived} / {self.injected}"


class Fault:
    """Strikes once, when a count has reached its point."""

    def __init__(self, kind: type[BaseException] | signal.Signals, point: int) -> None:
        self.kind, self._point = kind, point
        self.place = ""  # where it struck

    @property
    def name(self) -> str:
        """The error or the signal."""
        return self.kind.name if isinstance(self.kind, signal.Signals) else self.kind.__name__

    @property
    def interrupts(self) -> bool:
        """Whether it is for the user, and not to be survived."""
        return self.kind in (KeyboardInterrupt, signal.SIGINT)

    def at_line(self, count: int, frame: FrameType) -> None:
        """Strike, if this is the line."""
        if count == self._point:
            sys.settrace(None)
            self._strike(place_of(frame))

    def at_allocation(self, count: int) -> None:
        """Strike, if this is the allocation."""
        if count == self._point:
            self._strike(f"allocation {count}")

    def _strike(self, place: str) -> None:
        self.place = place
        if isinstance(self.kind, signal.Signals):
            signal.raise_signal(self.kind)
        else:
            raise self.kind("injected")


def place_of(frame: FrameType) -> str:
    """Return the file of geomwatch and the number of a line."""
    return f"{frame.f_code.co_filename.removeprefix(PACKAGE)[1:]}:{frame.f_lineno}"


def lines_of(call: Callable[[], object]) -> list[str]:
    """Return the place of each line that a call executes, in their order."""
    found: list[str] = []
    with Lines(lambda _, frame: found.append(place_of(frame))):
        call()
    return found


def allocations_of(call: Callable[[], object]) -> int:
    """Return how many tensors as large as the model a call makes."""
    with Allocations(lambda count: None) as counted:
        call()
    return counted.count


def points_in(places: Sequence[str], limit: int, rng: random.Random) -> list[int]:
    """Choose counts: the first and the last time of each line, then any, up to a limit."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for count, place in enumerate(places, 1):
        first.setdefault(place, count)
        last[place] = count
    chosen = sorted({*first.values(), *last.values()})
    if len(chosen) > limit:
        return sorted(rng.sample(chosen, limit))
    rest = sorted(set(range(1, len(places) + 1)) - set(chosen))
    return sorted(chosen + rng.sample(rest, min(len(rest), limit - len(chosen))))


def faults_at(points: Sequence[int]) -> list[Fault]:
    """Return a fault for each point, of the kinds in turn."""
    return [Fault(kind, point) for kind, point in zip(itertools.cycle(KINDS), points, strict=False)]


def inject(
    fault: Fault,
    mode: AbstractContextManager[Any],
    model: nn.Module,
    call: Callable[[], object],
    tally: Tally,
    *,
    stops: bool,
) -> None:
    """Call with a fault, and note what came of it, if it was reached."""
    world = World(model)
    problems: list[str] = []
    try:
        with mode:
            call()
        if fault.interrupts and fault.place:
            problems.append("the interrupt was swallowed")
    except KeyboardInterrupt:
        if not fault.interrupts:
            problems.append("stopped by an interrupt that nobody sent")
    except Exception as error:  # one that stops a run is what is counted
        if not stops:
            problems.append(f"the run was stopped by {type(error).__name__}")
    changes = world.changes()
    if fault.place:
        tally.note(f"{fault.name} at {fault.place}", problems + changes)
    if changes:  # nothing of it may spoil the next one
        undo._undo(0)


def at_lines(situation: Situation, limit: int, rng: random.Random) -> Tally:
    """Strike at lines of a situation, one after the other."""
    situation.prepare()
    tally = Tally()
    for fault in faults_at(points_in(lines_of(situation.call), limit, rng)):
        mode = Lines(fault.at_line)
        inject(fault, mode, situation.prepare(), situation.call, tally, stops=situation.stops)
    return tally


def at_allocations(situation: Situation, limit: int) -> Tally:
    """Strike at the first allocations of a situation, one after the other."""
    situation.prepare()
    tally = Tally()
    for point in range(1, min(allocations_of(situation.call), limit) + 1):
        fault = Fault(torch.OutOfMemoryError, point)
        mode = Allocations(fault.at_allocation)
        inject(fault, mode, situation.prepare(), situation.call, tally, stops=situation.stops)
    return tally
