"""The environment, pause and close: when a monitor does less, or nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loops import draws, sgd, small, train
from problems import cross_entropy, digits, mlp

from geomwatch import Monitor


def test_the_environment_switches_everything_off(monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    lines: list[dict[str, Any]] = []
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=20.0)
    with Monitor(model, cross_entropy, optimizer, sinks=[lines.append]) as monitor:
        monitor.observe(digits(8))
        assert train(model, optimizer, monitor, 20) == [None] * 20
    assert [monitor.history, monitor.alerts, lines] == [[], [], []]


@pytest.mark.parametrize("value", ["", "0"])
def test_the_environment_can_also_leave_it_on(value, monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", value)
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 1)
    assert len(monitor.history) == 1


def test_pause_stops_probes_and_resume_starts_them_again():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer, every=5)
    batches = draws()
    train(model, optimizer, monitor, 8, batches=batches)
    monitor.pause()
    train(model, optimizer, monitor, 8, batches=batches)
    monitor.resume()
    train(model, optimizer, monitor, 8, batches=batches)
    assert [r.step for r in monitor.history] == [0, 5, 16, 20]  # at once, then on its grid


def test_a_paused_monitor_still_watches_the_loss():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 3, batches=batches)
    monitor.pause()
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    train(model, optimizer, monitor, 3, batches=batches)
    assert [(a.rule, a.step) for a in monitor.alerts] == [("non_finite", 3)]


def test_close_takes_the_hook_off_the_optimizer_and_may_be_called_twice():
    model, optimizer = small()
    monitor = Monitor(model, cross_entropy, optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    train(model, optimizer, monitor, 2)
    monitor.close()
    assert not optimizer._optimizer_step_post_hooks
    alerts = list(monitor.alerts)
    monitor.close()
    assert monitor.alerts == alerts


def test_leaving_the_with_block_closes_the_monitor_also_on_an_error():
    model, optimizer = small()
    with pytest.raises(KeyboardInterrupt, match="enough"):  # noqa: SIM117
        with Monitor(model, cross_entropy, optimizer):
            raise KeyboardInterrupt("enough")
    assert not optimizer._optimizer_step_post_hooks


def test_close_closes_the_sinks_that_can_be_closed():
    class Tracker:
        closed = False

        def __call__(self, line: dict[str, Any]) -> None:
            assert not self.closed

        def close(self) -> None:
            self.closed = True

    model, optimizer = small()
    tracker, lines = Tracker(), []
    with Monitor(model, cross_entropy, optimizer, sinks=[tracker, lines.append]) as monitor:
        train(model, optimizer, monitor, 2)
        assert not tracker.closed
    assert tracker.closed
    assert lines
