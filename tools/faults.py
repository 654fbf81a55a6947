"""Faults injected into what geomwatch does, and how many of them left no trace: `make faults`.

A probe is run once to note each line of geomwatch that it executes. Then it is run again and again,
each time with an error raised at another one of them, or at another allocation as large as the
model, or with the signal of Ctrl-C at a line. Everything that a probe could disturb is compared bit
by bit with what it was before. `python tools/faults.py raw measure` runs some of the situations.
"""

from __future__ import annotations

import copy
import itertools
import logging
import random
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

import geomwatch
from geomwatch.isolation import undo
from geomwatch.landscape import barrier, bezier, density, hessian_directions, plane, slice_1d
from geomwatch.landscape.bezier import Bending

PACKAGE = str(Path(geomwatch.__file__).parent)
ERRORS = (KeyboardInterrupt, MemoryError, torch.OutOfMemoryError)
LARGE = 150  # elements: as many as the smallest model here has, and more than its batches


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
        if event == "line":
            self.count += 1
            self._at(self.count, frame)
        return self._trace


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
            "hooks": hooks + [[len(p._backward_hooks or ()) for p in params]],
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
    if isinstance(a, Tensor | np.ndarray):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# --- what a fault strikes in -----------------------------------------------------------------


@dataclass
class Situation:
    """What is called with a fault: `call` on what the last `prepare` has returned the model of."""

    prepare: Callable[[], nn.Module]
    call: Callable[[], object]
    stops: bool = False  # an error may stop it: it is no part of a training run


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy with a little of everything that draws random numbers."""
    noise = 1e-3 * (torch.rand(()) + np.random.rand() + random.random())
    return F.cross_entropy(model(batch[0]), batch[1]) * (1 + noise)


class Attentive(nn.Module):
    """An embedding with padding, attention, norms by batch and of weights, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, padding_idx=0)
        self.mix = parametrizations.spectral_norm(nn.Linear(4, 4))
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.head = parametrizations.weight_norm(nn.Linear(16, 3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).unsqueeze(1)
        x = self.mix(F.scaled_dot_product_attention(x, x, x)).flatten(1)
        return self.head(self.drop(self.norm(x)))


class Clipped(nn.Module):
    """Kinks, and a backward pass that can't be differentiated: products by differences."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(_Once.apply(self.layers(tokens)))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 1.5 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return 1.5 * slope


def batch_of(count: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 9, (count, 4)), torch.randint(0, 3, (count,))


class Watched:
    """A raw loop: a step before each fault, and the fault in its monitor.step."""

    def __init__(self, kind: Callable[[], nn.Module], *, first: bool, **options: Any) -> None:
        self._kind, self._first, self._options = kind, first, options
        self._start()

    def _start(self) -> None:
        torch.manual_seed(0)
        self.model = self._kind()
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self._monitor = geomwatch.Monitor(
            self.model, loss_fn, self._optimizer, **{"every": 1, **self._options}
        )

    def prepare(self) -> nn.Module:
        if self._first:
            self._start()
        self._monitor.resume()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._batch = batch_of()
        loss_fn(self.model, self._batch).backward()
        return self.model

    def call(self) -> None:
        self._monitor.step(self._batch)


class Measured:
    """A model with gradients, and something that is computed of it once."""

    def __init__(self, function: Callable[..., object], model: Callable[[], nn.Module]) -> None:
        self._function, self._make = function, model

    def prepare(self) -> nn.Module:
        torch.manual_seed(0)
        self.model = self._make()
        self._batch = batch_of()
        loss_fn(self.model, self._batch).backward()
        self._other = copy.deepcopy(self.model).state_dict()
        return self.model

    def call(self) -> object:
        return self._function(self.model, self._batch, self._other)


def situations() -> dict[str, list[Situation]]:
    """Return all of them, by the host or function that they are about."""
    few = geomwatch.Measurement(quantities=["lambda_max", "stability_margin", "temperature"])

    def raw(kind: Callable[[], nn.Module], **options: Any) -> Situation:
        watched = Watched(kind, **{"how": few, **options})
        return Situation(watched.prepare, watched.call)

    def once(function: Callable[..., object], kind: Any = Attentive) -> Situation:
        measured = Measured(function, kind)
        return Situation(measured.prepare, measured.call, stops=True)

    def half() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 7)).bfloat16()

    def flat() -> nn.Module:
        return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(16, 7))

    one = geomwatch.Measurement(quantities=["lambda_max", "roughness"])
    return {
        "raw": [
            raw(Attentive, first=True),
            raw(Attentive, first=False),
            raw(Clipped, first=True),
            raw(half, first=True),
            raw(Attentive, first=False, every=2),  # half of the calls are sentinels
            raw(Clipped, first=False, how=geomwatch.Measurement(quantities="all", micro_batch=8)),
        ],
        "measure": [
            once(lambda m, b, _: geomwatch.measure(m, loss_fn, b, how=one)),
            once(lambda m, b, _: geomwatch.measure(m, loss_fn, b, how=one), Clipped),
        ],
        "doctor": [once(lambda m, b, _: geomwatch.doctor(m, loss_fn, b))],
        "landscape": [
            once(lambda m, b, _: slice_1d(m, loss_fn, [b], _direction(m), alphas=[-1, 0, 1])),
            once(lambda m, b, _: hessian_directions(m, loss_fn, [b])),
            once(lambda m, b, _: density(m, loss_fn, [b], steps=3, probes=1)),
            once(lambda m, b, o: barrier(m, m.state_dict(), o, loss_fn, [b], points=3)),
            once(lambda m, b, o: bezier(m, m.state_dict(), o, loss_fn, [b], Bending(steps=3))),
            once(
                lambda m, b, _: plane(
                    m, loss_fn, [b], [_direction(m), _direction(m)], alphas=[0, 1]
                ),
                flat,
            ),
        ],
    }


def _direction(model: nn.Module) -> Tensor:
    return torch.randn(sum(p.numel() for p in model.parameters()))


# --- the count -------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of the faults of a situation."""

    injected: int = 0
    survived: int = 0
    failures: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, place: str, problems: Sequence[str]) -> None:
        self.injected += 1
        self.survived += not problems
        for problem in problems:
            self.failures[f"{kind} at {place}: {problem}"] += 1


def lines_of(situation: Situation) -> list[str]:
    """Return the file and number of each line that a call executes, in their order."""
    found: list[str] = []
    situation.prepare()
    with Lines(lambda _, frame: found.append(_place(frame))):
        situation.call()
    return found


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


def inject_at_lines(situation: Situation, points: Sequence[int], tally: Tally) -> None:
    """Raise an error at each of these lines in turn, or send the signal of Ctrl-C there."""
    faults = itertools.cycle([*ERRORS, signal.SIGINT])
    for point in points:
        fault, where = next(faults), [""]

        def strike(count: int, frame: FrameType, point: int = point, fault: Any = fault) -> None:
            if count != point:
                return
            where[0] = _place(frame)  # noqa: B023  # called before the next round
            sys.settrace(None)
            if fault is signal.SIGINT:
                signal.raise_signal(signal.SIGINT)
            else:
                raise fault("injected")

        _run(situation, lambda: Lines(strike), where, fault, tally)  # noqa: B023


def inject_at_allocations(situation: Situation, limit: int, tally: Tally) -> None:
    """Fail at each of the first allocations as large as the model, in turn."""
    situation.prepare()
    with Allocations(lambda count: None) as counted:
        situation.call()
    for point in range(1, min(counted.count, limit) + 1):
        where = [""]

        def strike(count: int, point: int = point) -> None:
            if count == point:
                where[0] = f"allocation {point}"  # noqa: B023
                raise torch.OutOfMemoryError("injected")

        _run(
            situation,
            lambda: Allocations(strike),  # noqa: B023
            where,
            torch.OutOfMemoryError,
            tally,
        )


def _run(
    situation: Situation, mode: Callable[[], Any], where: list[str], fault: Any, tally: Tally
) -> None:
    world = World(situation.prepare())
    problems: list[str] = []
    interrupts = fault in (KeyboardInterrupt, signal.SIGINT)
    try:
        with mode():
            situation.call()
        if interrupts and where[0]:
            problems.append("the interrupt was swallowed")
    except KeyboardInterrupt:
        if not interrupts:
            problems.append("stopped by an interrupt that nobody sent")
    except Exception as error:
        if not situation.stops:
            problems.append(f"the run was stopped by {type(error).__name__}")
    changes = world.changes()
    if where[0]:  # it was reached
        kind = getattr(fault, "__name__", getattr(fault, "name", ""))
        tally.note(kind, where[0], problems + changes)
    if changes:
        undo.until_here()  # nothing of it may spoil the next one
        undo._undo(0)


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.removeprefix(PACKAGE)[1:]}:{frame.f_lineno}"


def run(
    names: Sequence[str], *, lines: int, allocations: int, seed: int = 0
) -> Iterator[tuple[str, Tally, Tally]]:
    """Yield for each situation what came of faults at lines and at allocations."""
    rng = random.Random(seed)
    for name, several in situations().items():
        if name not in names:
            continue
        for number, situation in enumerate(several):
            at_lines, at_allocations = Tally(), Tally()
            points = points_in(lines_of(situation), lines, rng)
            inject_at_lines(situation, points, at_lines)
            inject_at_allocations(situation, allocations, at_allocations)
            yield f"{name} {number + 1}", at_lines, at_allocations


def main(arguments: Sequence[str]) -> int:
    logging.getLogger("geomwatch").setLevel(logging.CRITICAL)
    logging.getLogger("geomwatch").propagate = False
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = arguments or list(situations())
    total = [0, 0, 0, 0]
    failures: Counter[str] = Counter()
    print(f"{'situation':<14}{'lines':>14}{'allocations':>14}{'seconds':>9}")
    start = time.perf_counter()
    for name, lines, allocations in run(names, lines=400, allocations=100):
        now, start = time.perf_counter() - start, time.perf_counter()
        cells = [f"{t.survived} / {t.injected}" for t in (lines, allocations)]
        print(f"{name:<14}{cells[0]:>14}{cells[1]:>14}{now:>9.0f}", flush=True)
        counts = (lines.survived, lines.injected, allocations.survived, allocations.injected)
        total = [a + b for a, b in zip(total, counts, strict=True)]
        failures += lines.failures + allocations.failures
    print(f"{'all':<14}{f'{total[0]} / {total[1]}':>14}{f'{total[2]} / {total[3]}':>14}")
    for what, count in failures.most_common():
        print(f"{count} x {what}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
