"""Faults injected into what geomwatch does, and how many of them left no trace: `make faults`.

A probe is run once to note each line of geomwatch that it executes. Then it is run again and again,
each time with an error raised at another one of them, or at another allocation as large as the
model, or with the signal of Ctrl-C at a line. `python tools/faults.py raw measure` runs some of the
situations.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from fault_injector import Situation, Tally, at_allocations, at_lines
from faults_in_hosts import HOSTS, in_host
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import geomwatch
from geomwatch.landscape import barrier, bezier, density, hessian_directions, plane, slice_1d
from geomwatch.landscape.bezier import Bending


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
        """Return three logits."""
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
        """Return three logits."""
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
    """Draw tokens and labels."""
    return torch.randint(0, 9, (count, 4)), torch.randint(0, 3, (count,))


class Watched:
    """A raw loop: a step before each fault, and the fault in its monitor.step."""

    def __init__(self, kind: Callable[[], nn.Module], *, first: bool, **options: Any) -> None:
        self._kind, self._first, self._options = kind, first, options
        self._start()
        for _ in range(0 if first else 2):
            self.prepare()
            self.call()

    def _start(self) -> None:
        torch.manual_seed(0)
        self.model = self._kind()
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self._monitor = geomwatch.Monitor(
            self.model, loss_fn, self._optimizer, **{"every": 1, **self._options}
        )

    def prepare(self) -> nn.Module:
        """Take a step and compute the gradient of the next one."""
        if self._first:
            self._start()
        self._monitor.resume()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._batch = batch_of()
        loss_fn(self.model, self._batch).backward()
        return self.model

    def call(self) -> None:
        """Watch that step."""
        self._monitor.step(self._batch)


class Measured:
    """A model with gradients, and something that is computed of it once."""

    def __init__(self, function: Callable[..., object], model: Callable[[], nn.Module]) -> None:
        self._function, self._make = function, model

    def prepare(self) -> nn.Module:
        """Make the model anew, and compute a gradient."""
        torch.manual_seed(0)
        self.model = self._make()
        self._batch = batch_of()
        loss_fn(self.model, self._batch).backward()
        self._other = copy.deepcopy(self.model).state_dict()
        return self.model

    def call(self) -> object:
        """Compute what it is about."""
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
            once(lambda m, b, _: density(m, loss_fn, [b], steps=3, vectors=2)),
            once(lambda m, b, o: barrier(m, m.state_dict(), o, loss_fn, [b], points=3)),
            once(lambda m, b, o: bezier(m, m.state_dict(), o, loss_fn, [b], Bending(steps=3))),
            once(
                lambda m, b, _: plane(
                    m, loss_fn, [b], [_direction(m), _direction(m, 1)], alphas=[0, 1]
                ),
                flat,
            ),
        ],
    }


def _direction(model: nn.Module, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(sum(p.numel() for p in model.parameters()), generator=rng)


def run(names: Sequence[str], lines: int, allocations: int) -> Iterator[tuple[str, Tally, Tally]]:
    """Yield for each situation what came of faults at lines and at allocations."""
    rng = random.Random(0)
    for name, several in situations().items():
        for number, situation in enumerate(several if name in names else (), 1):
            yield (
                f"{name} {number}",
                at_lines(situation, lines, rng),
                at_allocations(situation, allocations),
            )
    for name in (name for name in HOSTS if name in names):
        yield name, *in_host(HOSTS[name], lines, allocations, rng)


def main(arguments: Sequence[str]) -> int:
    """Print what came of all faults, and of the failures each."""
    logging.getLogger("geomwatch").setLevel(logging.CRITICAL + 1)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = arguments or [*situations(), *HOSTS]
    lines, allocations = Tally(), Tally()
    print(f"{'faults survived':<16}{'at lines':>14}{'allocations':>14}{'seconds':>9}")
    start = time.perf_counter()
    for name, of_lines, of_allocations in run(
        names,
        lines=300,
        allocations=80,
    ):
        lines, allocations = lines + of_lines, allocations + of_allocations
        now, start = time.perf_counter() - start, time.perf_counter()
        print(f"{name:<16}{of_lines!s:>14}{of_allocations!s:>14}{now:>9.0f}", flush=True)
    print(f"{'all':<16}{lines!s:>14}{allocations!s:>14}")
    failures = lines.failures + allocations.failures
    for what, count in failures.most_common():
        print(f"{count} x {what}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
