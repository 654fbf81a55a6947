"""What a loss changes beside the model and can't be put back is told; threads keep their draws."""

from __future__ import annotations

import collections
import itertools
import logging
import random
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from noise_outside import assert_unseen, net, plain, weights_after
from torch import Tensor, nn

import geomwatch

HIDDEN: dict[str, Any] = {}
count = 0


def told_before_the_first_step(loss_fn: Any, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what is said in the call that comes before the first step."""
    torch.manual_seed(0)
    model, x = net(), torch.randn(16, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(model, loss_fn, optimizer)
    loss_fn(model, x).backward()
    with caplog.at_level(logging.WARNING, "geomwatch"):
        monitor.step(x)
    return [m for m in caplog.messages if "is_probing" in m]


@pytest.fixture
def effects(tmp_path: Path) -> Iterator[dict[str, tuple[Callable[[], object], str]]]:
    """What a loss does beside, and the name by which it is to be told."""
    calls: list[int] = []
    sizes: dict[str, int] = {"n": 0}
    numbers = itertools.count()
    over_list, over_range, pairs = iter([0] * 999), iter(range(999)), zip(range(99), range(99))  # noqa: B905
    running, history, stack = torch.zeros(2), np.zeros(2), collections.deque([0])
    counter: collections.Counter[str] = collections.Counter()
    log = (tmp_path / "log").open("w")
    (tmp_path / "data").write_text("x" * 1000)
    data = (tmp_path / "data").open("rb")
    tally = types.SimpleNamespace(inner=types.SimpleNamespace(calls=0))
    loader = iter(torch.utils.data.DataLoader(torch.arange(999)))

    def numbered() -> Iterator[int]:
        yield from range(999)

    made, total = numbered(), 0.0

    def nonlocal_counter() -> None:
        nonlocal total
        total += 1.0

    def global_counter() -> None:
        global count
        count += 1

    def growing() -> None:
        calls.append(1)

    def entry() -> None:
        sizes["n"] += 1

    def attribute() -> None:
        tally.inner.calls += 1

    yield {
        "a counter of the script": (global_counter, "count"),
        "a counter of a function": (nonlocal_counter, "total"),
        "a list that grows": (growing, "calls"),
        "an entry of a dict": (entry, "sizes['n']"),
        "a deque that grows": (lambda: stack.append(1), "stack"),
        "a Counter": (lambda: counter.update(["a"]), "counter['a']"),
        "an attribute, deep inside": (attribute, "tally.inner.calls"),
        "itertools.count": (lambda: next(numbers), "numbers"),
        "an iterator over a list": (lambda: next(over_list), "over_list"),
        "an iterator over a range": (lambda: next(over_range), "over_range"),
        "a zip": (lambda: next(pairs), "pairs"),
        "a generator function": (lambda: next(made), "made"),
        "an iterator over a DataLoader": (lambda: next(loader), "loader"),
        "a file that is written": (lambda: log.write("step\n"), "log"),
        "a file that is read": (lambda: data.read(1), "data"),
        "a tensor in place": (lambda: running.add_(1), "running"),
        "an array in place": (lambda: history.__iadd__(1), "history"),
    }
    log.close()
    data.close()


EFFECTS = [
    "a counter of the script",
    "a counter of a function",
    "a list that grows",
    "an entry of a dict",
    "a deque that grows",
    "a Counter",
    "an attribute, deep inside",
    "itertools.count",
    "an iterator over a list",
    "an iterator over a range",
    "a zip",
    "a generator function",
    "an iterator over a DataLoader",
    "a file that is written",
    "a file that is read",
    "a tensor in place",
    "an array in place",
]


@pytest.mark.parametrize("kind", EFFECTS)
def test_what_goes_on_with_each_evaluation_is_told_before_the_first_step(kind, effects, caplog):
    effect, name = effects[kind]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        effect()
        return plain(model, x)

    (message,) = told_before_the_first_step(loss_fn, caplog)
    assert f"changes '{name}" in message.replace('"', "'")
    assert "pass a loss_fn= that depends on the model and the batch alone" in message


def test_an_iterator_that_feeds_the_loss_is_told_by_what_it_makes_of_the_loss(caplog):
    batches = map(torch.rand, itertools.repeat((16, 6)))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return plain(model, x + next(opaque()))

    def opaque() -> Iterator[Tensor]:
        return HIDDEN["batches"]

    HIDDEN["batches"] = iter([torch.full((16, 6), float(i)) for i in range(9999)])
    found = told_before_the_first_step(loss_fn, caplog)
    assert any("on the same batch, weights and random state" in message for message in found)
    del batches


def test_what_steps_aside_or_only_reads_or_draws_is_told_of_nothing(caplog):
    calls: list[int] = []
    last: dict[str, Tensor] = {}
    owner = types.SimpleNamespace(scale=1.0, names=["a"], table=np.ones(3))

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        if not geomwatch.is_probing():
            calls.append(1)
        last["loss"] = loss = owner.scale * plain(model, x) * (1 + 0.01 * torch.rand(()))
        last["loss"] = last["loss"].detach()
        return loss + 0 * float(owner.table.sum()) + 0 * np.random.rand() + 0 * random.random()

    assert told_before_the_first_step(loss_fn, caplog) == []


def test_attributes_of_the_model_and_of_an_owner_are_put_back_and_not_told(caplog):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls, self.seen = net(), 0, []
            self.register_buffer("running", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x.shape)
            self.running += x.mean().detach()
            return self.net(x)

    model, x = Counting(), torch.randn(16, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(model, plain, optimizer)
    plain(model, x).backward()
    with caplog.at_level(logging.WARNING, "geomwatch"):
        monitor.step(x)
    assert (model.calls, len(model.seen)) == (1, 1)
    assert caplog.messages == []


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand((), dtype=torch.float64)),
    "NumPy": np.random.rand,
    "Python": random.random,
}


@pytest.mark.parametrize("kind", DRAWS)
def test_what_another_thread_draws_is_not_drawn_again(kind):
    drawn: list[float] = []
    done = threading.Event()

    def draw() -> None:
        while not done.wait(0.0005):
            drawn.append(DRAWS[kind]())

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        weights_after(lambda: (plain, lambda x: x.clone()), watched=True, steps=9)
    finally:
        done.set()
        thread.join()
    assert len(drawn) > 20
    assert len(set(drawn)) >= len(drawn) - 1  # one, while it is not known yet that it draws


@pytest.mark.parametrize("kind", DRAWS)
def test_what_the_loss_draws_is_drawn_again_though_other_threads_are_alive(kind):
    done = threading.Event()
    thread = threading.Thread(target=done.wait, daemon=True)
    thread.start()

    def noisy(model: nn.Module, x: Tensor) -> Tensor:
        return plain(model, x) * (1 + DRAWS[kind]())

    def make() -> Any:
        random.seed(0)
        np.random.seed(0)
        return noisy, lambda x: x

    try:
        assert_unseen(make)
    finally:
        done.set()
        thread.join()
