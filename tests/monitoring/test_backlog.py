"""Steps that wait: rules are told of all of them, in order, and of what is not calm at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.monitoring.dispatch import Dispatch
from geomwatch.rules import BadBatch, LossRise, NonFinite
from geomwatch.rules.grad_norm_spike import GradNormSpike
from geomwatch.rules.no_progress import NoProgress


def judging() -> list[Any]:
    return [NonFinite(), BadBatch(), NoProgress(), LossRise(), GradNormSpike()]


def spoilt(rules: list[Any], *, norms: bool) -> geomwatch.Monitor:
    """Train with weights that are turned over at step 63, and a NaN for a loss at 77."""
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    how = geomwatch.Measurement(quantities=["grad_norm"])
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, how, rules=rules)
    for step in range(90):
        optimizer.zero_grad()
        if step == 63:
            model[0].weight.data.mul_(-5)
        loss = cross_entropy(model, batch)
        loss.backward()
        told = loss.detach() * (torch.nan if step == 77 else 1.0)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9) if norms else None
        monitor.step(batch, loss=told, grad_norm=norm)
        optimizer.step()
    monitor.close()
    return monitor


@pytest.mark.parametrize("norms", [False, True])
def test_rules_know_and_say_the_same_whether_steps_wait_or_not(norms, monkeypatch):
    waiting = judging()
    shown: list[int] = []
    waited = NonFinite.waited
    monkeypatch.setattr(
        NonFinite, "waited", lambda rule, steps: (shown.append(len(steps)), waited(rule, steps))
    )
    patient = spoilt(waiting, norms=norms)
    assert sum(shown) > 20
    monkeypatch.setattr(Dispatch, "calm", lambda self: None)
    at_once = judging()
    impatient = spoilt(at_once, norms=norms)
    assert [(a.rule, a.step, a.message) for a in patient.alerts] == [
        (a.rule, a.step, a.message) for a in impatient.alerts
    ]
    assert {a.rule for a in patient.alerts} == {"non_finite", "loss_rise"}
    for one, other in zip(waiting, at_once, strict=True):
        if not isinstance(one, NoProgress):  # whose mean is of the steps with a norm
            assert one.state_dict() == other.state_dict()


def test_an_alert_of_the_loss_comes_with_the_call_that_brings_it():
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    for step in range(36):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        assert not monitor.alerts
        monitor.step(batch, loss=loss.detach() * (torch.nan if step == 35 else 1))
        optimizer.step()
    assert [a.rule for a in monitor.alerts] == ["non_finite"]


def test_a_rule_that_judges_otherwise_than_its_parent_sees_every_step():
    class Counting(LossRise):
        calls = 0

        def __call__(self, step: Any) -> Any:
            self.calls += 1
            return super().__call__(step)

    rule = Counting()
    spoilt([rule], norms=False)
    assert rule.calls == 91  # and the last once more at the end
