"""What would make a host wait for its accelerator, counted on the CPU under a pretended one."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geomwatch import Monitor
from geomwatch.monitoring.scalars import StepScalars

WAITS = ("_local_scalar_dense", "nonzero", "equal", "masked_select")  # for a device, and item()


class Waits(TorchDispatchMode):
    """Counts the operations that hand a value of a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Event:
    """Stands for torch.cuda.Event; notes the stream it was recorded on, and that it was awaited."""

    made: ClassVar[list[Event]] = []

    def __init__(self) -> None:
        self.stream: Any = None
        self.waits = 0
        Event.made.append(self)

    def record(self, stream: Any = None) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        self.waits += 1


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Have tensors of the CPU taken for those of a device, whose module is returned."""
    empty = torch.empty
    module = SimpleNamespace(Event=Event, current_stream=lambda device: ("stream", device))
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda _: False))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(Event, "made", [])
    return module


def test_the_event_of_a_scalar_is_recorded_on_the_stream_of_its_own_device(pretended):
    StepScalars().loss(torch.tensor(1.0))
    (event,) = Event.made
    assert event.stream == ("stream", torch.device("cpu"))  # that of the tensor


def test_a_scalar_is_awaited_when_it_is_read_and_not_before(pretended):
    scalars = StepScalars()
    with Waits() as waits:
        scalars.put(0, scalars.loss(torch.tensor(1.5)), None)
    assert not waits.counts
    assert [event.waits for event in Event.made] == [0]
    settled = scalars.take(1)
    assert settled is not None
    assert settled.loss == 1.5
    assert [event.waits for event in Event.made] == [1]


def test_of_a_device_without_streams_a_scalar_is_read_a_step_later(pretended):
    del pretended.Event
    scalars, loss = StepScalars(), torch.tensor(1.5)
    with Waits() as waits:
        scalars.put(0, scalars.loss(loss), None)
        loss.zero_()  # by the loop that it belongs to
    assert not waits.counts
    settled = scalars.take(1)
    assert settled is not None
    assert settled.loss == 1.5


def test_an_idle_step_waits_for_nothing_and_a_look_or_sample_does():
    """Passed as numbers, loss and norm are the loop's own waits; all others would be ours."""
    model, batch = mlp(64, 8, 10), digits(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = Monitor(model, cross_entropy, optimizer, every=1000)
    idle, looking = [], []
    for _ in range(30):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        number = float(loss.detach())
        looks, samples = len(monitor.looks), monitor._moved._kept
        with Waits() as waits:
            monitor.step(batch, loss=number, grad_norm=0.1)
        is_idle = len(monitor.looks) == looks and monitor._moved._kept is samples
        (idle if is_idle else looking).append(sum(waits.counts.values()))
        optimizer.step()
    assert len(idle) > 10
    assert looking
    assert max(looking) > 0
    assert not any(idle)
