"""Silence means "watched and fine": where nothing can be measured, it is said."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
from loops import Batch, draws, small, train
from problems import cross_entropy
from torch import Tensor, nn

import geomwatch
from geomwatch import Monitor
from geomwatch.monitoring.heartbeat import Heartbeat


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def failing_until(last: int) -> Any:
    """A loss that raises in all probes of steps before `last`."""
    steps = itertools.count()

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        if not geomwatch.is_probing():
            loss_fn.step = next(steps)
        elif loss_fn.step < last:
            raise RuntimeError("no second helping")
        return cross_entropy(model, batch)

    loss_fn.step = 0
    return loss_fn


def test_failed_probes_are_tried_again_after_gaps_that_grow(caplog):
    model, optimizer = small()
    loss_fn = failing_until(320)
    monitor = Monitor(model, loss_fn, optimizer)
    train(model, optimizer, monitor, 730, loss_fn=loss_fn)
    paused = [w for w in warnings_in(caplog) if "probing is paused" in w]
    assert "It is tried again at step 102" in paused[0]
    assert len(paused) == 3  # 100, 200 and 400 steps later
    assert monitor.history[0].step >= 702
    assert "call loss_fn(model, batch) again" not in paused[0]


def test_loss_fn_is_blamed_for_what_it_has_raised_alone(caplog, monkeypatch):
    model, optimizer = small()
    loss_fn = failing_until(9)
    train(model, optimizer, Monitor(model, loss_fn, optimizer), 1, loss_fn=loss_fn)
    assert "A probe calls loss_fn(model, batch) again on the same batch" in caplog.text
    caplog.clear()

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("odd kernel")

    monkeypatch.setattr("geomwatch.monitoring.prober.evaluate", broken)
    model, optimizer = small()
    train(model, optimizer, Monitor(model, cross_entropy, optimizer), 1)
    assert "a probe failed with RuntimeError: odd kernel" in caplog.text
    assert "loss_fn worked" in caplog.text
    assert "again on the same batch" not in caplog.text


def test_a_run_without_a_margin_for_an_interval_is_told_so_once_and_at_its_end(caplog):
    model, optimizer = small()
    loss_fn = failing_until(1000)
    with Monitor(model, loss_fn, optimizer) as monitor:
        train(model, optimizer, monitor, 250, loss_fn=loss_fn)
    said = [w for w in warnings_in(caplog) if "no margin could be measured" in w]
    assert len(said) == 2
    assert "in 100 calls of monitor.step(): a probe failed with RuntimeError: no second" in said[0]
    assert "geomwatch.doctor(model, loss_fn, batch" in said[0]
    assert said[1].startswith("at the end: no margin could be measured in 250 calls")


def test_a_short_run_in_which_nothing_was_measured_ends_with_the_reason(caplog):
    model, optimizer = small()
    loss_fn = failing_until(1000)
    with Monitor(model, loss_fn, optimizer) as monitor:
        train(model, optimizer, monitor, 5, loss_fn=loss_fn)
    assert "at the end: no margin could be measured in 5 calls" in warnings_in(caplog)[-1]


def test_an_optimizer_that_never_steps_is_told_of(caplog):
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    for batch in itertools.islice(draws(), 120):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
    (said,) = warnings_in(caplog)
    assert "no step of the optimizer was counted in 101 calls" in said
    assert "monitor.follow(optimizer)" in said


@pytest.mark.parametrize("options", [{}, {"every": 300}, {"budget": 0.001}])
def test_a_run_that_is_watched_has_nothing_to_say(options, caplog):
    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer, **options) as monitor:
        train(model, optimizer, monitor, 320)
    assert not [w for w in warnings_in(caplog) if "calls of monitor.step()" in w]


def test_a_pause_that_was_asked_for_is_no_lapse(caplog):
    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer) as monitor:
        monitor.pause()
        train(model, optimizer, monitor, 150)
    assert not warnings_in(caplog)


def test_a_lapse_is_told_once_and_the_next_one_again():
    heart = Heartbeat(interval=3)
    said = [heart.beat(step, usable=usable) for step, usable in enumerate([1, 0, 0, 0, 0, 1, 0, 0])]
    assert said == [False, False, False, True, False, False, False, False]
    assert heart.beat(8, usable=False)
    assert heart.ends_blind()
