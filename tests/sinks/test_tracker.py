"""Trackers as sinks: curves with points enough, and alerts in the way that each has them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from loops import sgd, small, train
from problems import cross_entropy
from run_lines import alert
from trackers import tensorboard_scalars

from geomwatch import Measurement, Monitor, Tracker, UsageError
from geomwatch.sinks import alert_line


def test_a_healthy_run_of_300_steps_is_a_curve_in_tensorboard(tmp_path):
    board = pytest.importorskip("torch.utils.tensorboard")
    model, _ = small()
    with board.SummaryWriter(str(tmp_path)) as writer:
        how = Measurement(quantities="stability_margin")
        monitor = Monitor(model, cross_entropy, sgd(model, 0.02), how, sinks=Tracker(writer))
        train(model, monitor._optimizer, monitor, 300)
        monitor.close()
    found = tensorboard_scalars(tmp_path)
    assert len(found["geom/gradient_margin"]) >= 10
    steps = [look.step for look in monitor.looks]
    for name in ("gradient_margin", "limit", "alert_level"):
        assert [step for step, _ in found[f"geom/{name}"]][-8:] == steps[-8:]
    assert {level for _, level in found["geom/alert_level"]} == {0.0}
    ratio = found["geom/update_ratio"][-1][1]
    shown = replace(monitor.looks[-1], overhead=0.019).scalars()
    assert shown["geom/overhead"] == 0.019  # the clock of tests stands still
    assert 1e-6 < ratio < 0.1
    assert math.isclose(ratio, monitor.looks[-1].update_ratio, rel_tol=1e-6)


class Kept:
    """A tracker that keeps what it is told."""

    def __init__(self, *names: str) -> None:
        self.told: list[tuple[str, Any, Any]] = []
        for name in names:
            setattr(self, name, lambda *a, name=name, **k: self.told.append((name, a, k)))


def test_an_alert_is_sent_the_way_a_tracker_has_them():
    line = alert_line(alert("critical"))
    board, run, store = (
        Kept("add_scalar", "add_text"),
        Kept("log", "alert"),
        Kept("log_metrics", "set_tag"),
    )
    for tracker in (board, run, store):
        Tracker(tracker)(line)
    assert board.told == [
        ("add_text", ("geom/alert", "**critical** stability_margin: the margin is 0.7", 41), {})
    ]
    text = {"title": "geomwatch: stability_margin at step 41", "text": "the margin is 0.7"}
    assert run.told == [("alert", (), {**text, "level": "ERROR"})]
    said = "step 41, critical: the margin is 0.7"
    assert store.told == [("set_tag", ("geom.alert.stability_margin", said), {})]


def test_what_is_no_tracker_is_refused():
    with pytest.raises(UsageError, match="tracker must be a SummaryWriter"):
        Tracker("runs/first")
