"""Errors at any line or allocation of a probe leave no trace: a tenth of `make faults`."""

from __future__ import annotations

import random
import signal

import pytest
import torch
from fault_injector import Fault, Lines, Tally, at_allocations, at_lines, inject, lines_of
from faults import situations
from torch import Tensor

from geomwatch.isolation import isolation
from geomwatch.isolation.snapshot import Snapshot

SITUATIONS = situations()
CHOSEN = {
    f"{name} {number}": situation
    for name, several in SITUATIONS.items()
    for number, situation in enumerate(several, 1)
}


@pytest.mark.parametrize("name", CHOSEN)
def test_an_error_or_a_signal_at_any_line_leaves_no_trace_and_stops_no_run(name):
    tally = at_lines(CHOSEN[name], 40 if name == "raw 1" else 10, random.Random(0))
    assert tally.injected > 5
    assert not tally.failures


@pytest.mark.parametrize("name", ["raw 1", "raw 4", "measure 1", "landscape 1"])
def test_an_allocation_that_fails_leaves_no_trace_and_stops_no_run(name):
    tally = at_allocations(CHOSEN[name], 12)
    assert tally.injected == 12
    assert not tally.failures


def strike(kind: type[BaseException] | signal.Signals, ending: str) -> Tally:
    """Strike at a line of the first probe, by the end of its file's name."""
    situation, tally = SITUATIONS["raw"][0], Tally()
    situation.prepare()
    places = lines_of(situation.call)
    point = next(i for i, place in enumerate(places, 1) if place.startswith(ending))
    fault = Fault(kind, point)
    model = situation.prepare()
    inject(fault, Lines(fault.at_line), model, situation.call, tally, stops=False)
    return tally


def test_the_injector_notices_gradients_that_are_not_put_back(monkeypatch):
    def aside(params: list[Tensor]) -> None:
        for p in params:
            p.grad = None

    monkeypatch.setattr(isolation, "_gradients_aside", aside)
    found = strike(MemoryError, "curvature/double_backward.py").failures
    assert any("gradients" in failure for failure in found)


def test_the_injector_notices_weights_that_are_not_put_back(monkeypatch):
    monkeypatch.setattr(Snapshot, "restore", lambda self: None)
    tally = Tally()
    situation = SITUATIONS["raw"][0]
    model = situation.prepare()
    fault = Fault(MemoryError, 10**9)
    fault.place = "nowhere"
    inject(fault, Lines(fault.at_line), model, situation.call, tally, stops=False)
    assert any("random states" in failure for failure in tally.failures)


def test_an_interrupt_passes_through_and_no_other_error_does():
    for kind in (KeyboardInterrupt, signal.SIGINT, torch.OutOfMemoryError):
        tally = strike(kind, "curvature/replay.py")
        assert (tally.injected, tally.survived) == (1, 1)
