"""What rules say, and to whom: the list, the record, the callback, the log and the sinks."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from faces import faced
from loops import DENSE, draws, sgd, small, train
from problems import cross_entropy, mlp

from geomwatch import Alert, Monitor
from geomwatch.rules import NonFinite, Observation


def test_a_jump_of_the_rate_is_critical_before_the_step_that_it_ruins():
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=0.1)
    monitor = Monitor(model, cross_entropy, optimizer)

    def jump(step: int) -> None:
        if step == 60:
            assert not monitor.alerts
            optimizer.param_groups[0]["lr"] *= 30

    batches = draws()
    train(model, optimizer, monitor, 60, batches=batches, before=jump)
    batch = next(batches)
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    jump(60)
    record = monitor.step(batch)
    assert record.step == 60
    assert [(a.rule, a.severity, a.step) for a in record.alerts] == [
        ("stability_margin", "critical", 60),
        ("gradient_margin", "warning", 60),
        ("headroom", "critical", 60),
        ("rate_jump", "critical", 60),
    ]
    assert record.alerts[0].value > 2
    assert "The rate is beyond what the curvature allows" in record.alerts[0].message


class Listening(NonFinite):
    """Notes what rules get to see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Observation] = []

    def __call__(self, seen: Observation) -> None:
        self.seen.append(seen)


def test_between_probes_rules_see_the_last_margin_at_the_present_rate():
    model, optimizer = small()
    rule = Listening()
    monitor = Monitor(model, cross_entropy, optimizer, every=5, rules=[rule])

    def ramp(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + 0.1 * step)

    train(model, optimizer, monitor, 10, before=ramp)
    assert [seen.fresh for seen in rule.seen] == [True, *[False] * 4] * 2
    for step, seen in enumerate(rule.seen):
        record = monitor.history[step // 5]
        margin, growth = record["stability_margin"], (10 + step) / (10 + record.step)
        assert seen.margin.value == pytest.approx(growth * margin.value)
        assert seen.margin.error == pytest.approx(growth * margin.error)
        assert (seen.index, seen.lr) == (step, (0.05 * (1 + 0.1 * step),))


def test_alerts_go_to_the_list_the_record_the_callback_and_the_log(caplog):
    told: list[Alert] = []
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=20.0)
    monitor = Monitor(model, cross_entropy, optimizer, on_alert=told.append)
    train(model, optimizer, monitor, 3)
    assert told == monitor.alerts
    assert [a for r in monitor.history for a in r.alerts] == told
    first = next(alert for alert in told if alert.severity == "critical")
    critical = [r.getMessage() for r in caplog.records if r.levelno == logging.CRITICAL]
    indented = first.message.replace("\n", "\n    ")
    assert critical[0] == f"step {first.step}: {indented}"


def test_layers_are_named_in_a_margin_alert():
    model = mlp(64, 16, 10)
    optimizer = sgd(model, lr=20.0)
    monitor = Monitor(model, cross_entropy, optimizer)
    train(model, optimizer, monitor, 3)
    alert = next(a for a in monitor.alerts if a.rule == "stability_margin")
    assert {layer.split(" ")[0] for layer in alert.layers} <= {"0", "2"}
    assert alert.layers[0] in alert.message


class Talkative(NonFinite):
    """Has something to say at every step."""

    name = "talkative"

    def __call__(self, seen: Observation) -> Alert:
        return Alert(self.name, "info", "another step", 1.0, 1.0, seen.index)


class Broken(NonFinite):
    """A callback, sink or rule that raises whenever it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, message: Any) -> None:
        self.calls += 1
        raise OSError("disk full")


@pytest.mark.parametrize("part", ["on_alert", "sinks", "rules"])
def test_a_callback_sink_or_rule_that_raises_does_not_stop_the_run(part, caplog):
    broken = Broken()
    model, optimizer = small()
    told: list[Alert] = []
    options: dict[str, Any] = {"on_alert": told.append, "rules": [Talkative()]}
    parts = {"on_alert": broken, "sinks": [broken], "rules": [broken, Talkative()]}
    monitor = Monitor(model, cross_entropy, optimizer, **faced(options | {part: parts[part]}))
    train(model, optimizer, monitor, 12)
    assert broken.calls >= 12
    assert len(monitor.alerts) == 12
    assert len(told) == (0 if part == "on_alert" else 12)
    assert [r.step for r in monitor.history] == DENSE
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "failed with OSError: disk full" in warnings[0]


def test_a_sink_that_cannot_be_closed_does_not_stop_the_program(caplog):
    class Stuck:
        def __call__(self, line: dict[str, Any]) -> None:
            pass

        def close(self) -> None:
            raise OSError("stale file handle")

    model, optimizer = small()
    with Monitor(model, cross_entropy, optimizer, sinks=[Stuck()]) as monitor:
        train(model, optimizer, monitor, 2)
    assert "could not be closed: OSError: stale file handle" in caplog.text
