"""What a monitor must not forget in a checkpoint, and a gradient it must not trust."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from faces import faced
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.controllers import LearningRateCap


def watched(**options):
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer, geomwatch.Monitor(model, cross_entropy, optimizer, **faced(options))


def step(model, optimizer, monitor, batch, *, take=True):
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    record = monitor.step(batch)
    if take:
        optimizer.step()
    return record


def test_a_jump_of_the_learning_rate_at_a_resume_is_probed_at_once():
    batch = digits(64)
    model, optimizer, monitor = watched(every=100)
    for _ in range(60):
        step(model, optimizer, monitor, batch)
    saved = monitor.state_dict()
    other = geomwatch.Monitor(model, cross_entropy, optimizer, every=100)
    other.load_state_dict(saved)
    optimizer.param_groups[0]["lr"] *= 10
    record = step(model, optimizer, other, batch)
    assert record is not None
    assert record.step == 60


class Capped:
    """A run on a batch that goes with the step, whose rate a controller caps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = mlp(64, 16, 10, activation=torch.nn.Tanh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=2.0, momentum=0.9)
        self.monitor = geomwatch.Monitor(
            self.model, cross_entropy, self.optimizer, controllers=LearningRateCap()
        )
        self.parts: tuple[Any, ...] = (self.model, self.optimizer, self.monitor)

    def run(self, *steps: int) -> torch.Tensor:
        x, y = digits(512)
        for at in steps:
            shift = 37 * at % 480
            step(*self.parts, (x[shift : shift + 32], y[shift : shift + 32]))
        return torch.nn.utils.parameters_to_vector(self.model.parameters()).detach()


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_capped_run_goes_on_to_the_last_bit_wherever_it_was_stopped(stop):
    whole, first, second = Capped(), Capped(), Capped()
    expected = whole.run(*range(8))
    first.run(*range(stop))
    for part, other in zip(first.parts, second.parts, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    assert torch.equal(second.run(*range(stop, 8)), expected)
    assert len(whole.monitor.history) > 1
    assert whole.monitor.adjustments


def test_what_is_asked_for_after_a_resume_is_measured():
    model, optimizer, monitor = watched(every=2)
    step(model, optimizer, monitor, digits(64))
    other = geomwatch.Monitor(
        model, cross_entropy, optimizer, geomwatch.Measurement(hvp="finite_difference"), every=2
    )
    other.load_state_dict(monitor.state_dict())
    for _ in range(2):
        step(model, optimizer, other, digits(64))
    assert other.history[-1].provenance["backend"] == "finite_difference"


def test_a_run_without_a_checkpoint_of_ours_is_counted_from_the_step_it_has_reached():
    model, optimizer, monitor = watched(every=3, quantities=["loss"])
    monitor.start_at(7)
    for _ in range(6):
        step(model, optimizer, monitor, digits(16))
    assert [record.step for record in monitor.history] == [7, 9, 12]
    assert monitor.state_dict()["step"] == 13


def test_a_first_step_must_be_a_number_of_steps_and_come_before_any():
    model, optimizer, monitor = watched(quantities=["loss"])
    for wrong in (-1, 2.0, True):
        with pytest.raises(geomwatch.UsageError, match="step must be the number of optimizer ste"):
            monitor.start_at(wrong)
    step(model, optimizer, monitor, digits(16))
    with pytest.raises(geomwatch.UsageError, match=r"start_at\(7\) must come before the first"):
        monitor.start_at(7)


def test_difficulty_goes_on_growing_after_a_resume():
    batch = digits(64)
    options = {"quantities": ["difficulty", "lambda_max"], "every": 10}
    model, optimizer, monitor = watched(**options)
    for _ in range(15):
        step(model, optimizer, monitor, batch)
    other = geomwatch.Monitor(model, cross_entropy, optimizer, **faced(options))
    other.load_state_dict(monitor.state_dict())
    for _ in range(6):
        step(model, optimizer, other, batch)
    for _ in range(2):
        step(model, optimizer, other, batch)
    before = monitor.history[-1]["difficulty"].value
    assert other.history[-1].step == 20
    assert other.history[-1]["difficulty"].value > before


def test_rules_and_difficulty_see_each_step_once_across_a_resume():
    class Listening(geomwatch.rules.NonFinite):
        def __call__(self, seen):
            if seen.settled is not None:
                heard.append((seen.settled.step, seen.settled.loss, seen.settled.stepped))

    def train(steps, *, resume_at=None):
        heard.clear()
        options = {
            "rules": [Listening()],
            "quantities": ["lambda_max", "difficulty"],
            "every": 100,  # lambda_max is measured at step 0, and held from there
        }
        model, optimizer, monitor = watched(**options)
        for t in range(steps):
            if t == resume_at:
                saved, monitor = monitor.state_dict(), None
                monitor = geomwatch.Monitor(model, cross_entropy, optimizer, **faced(options))
                monitor.load_state_dict(saved)
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            monitor.step(batch, loss=loss)
            optimizer.step()
        return list(heard), monitor.state_dict()["difficulty"]

    heard, batch = [], digits(64)
    whole = train(6)
    assert train(6, resume_at=3) == whole
    assert [step for step, _, _ in heard] == [0, 1, 2, 3, 4]
    assert whole[1]["total"] > 0


def test_an_infinite_gradient_has_no_margin_but_a_reason():
    batch = digits(64)
    model, optimizer, monitor = watched(every=1)
    step(model, optimizer, monitor, batch)
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    next(model.parameters()).grad[0, 0] = float("inf")
    record = monitor.step(batch)
    assert record["stability_margin"].value is None
    assert "not finite" in record["stability_margin"].reason
    assert record["lambda_max"].value > 0


def test_scaled_gradients_are_recognised_after_an_infinite_first_one(caplog):
    batch = digits(64)
    model, optimizer, monitor = watched(every=1)
    for scale in (float("inf"), 2.0**16):
        optimizer.zero_grad()
        (cross_entropy(model, batch) * 1.0).backward()
        for p in model.parameters():
            p.grad.mul_(scale)
        monitor.step(batch)
        optimizer.step() if scale != float("inf") else monitor._counter.count()
    assert any("scaler.unscale_(optimizer)" in r.getMessage() for r in caplog.records)


def test_a_monitor_may_be_paused_from_the_start():
    batch = digits(64)
    model, optimizer, monitor = watched()
    monitor.pause()
    assert step(model, optimizer, monitor, batch) is None
    monitor.resume()
    assert step(model, optimizer, monitor, batch) is not None


def test_steps_without_a_batch_are_told_of_once(caplog):
    batch = digits(64)
    model, optimizer, monitor = watched(every=1)
    step(model, optimizer, monitor, batch)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        assert monitor.step() is None
        optimizer.step()
    told = [r for r in caplog.records if "has no batch to probe on" in r.getMessage()]
    assert len(told) == 1


def test_an_optimizer_without_hooks_resumes_at_its_step():
    class Plain:
        def __init__(self, params):
            self.param_groups = [{"params": list(params), "lr": 0.05}]

        def step(self):
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad, alpha=-0.05)

        def zero_grad(self):
            for p in self.param_groups[0]["params"]:
                p.grad = None

    model, batch = mlp(64, 8, 10), digits(64)
    optimizer = Plain(model.parameters())
    options = {"every": 1}
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, **faced(options))
    for _ in range(10):
        step(model, optimizer, monitor, batch)
    other = geomwatch.Monitor(model, cross_entropy, optimizer, **faced(options))
    other.load_state_dict(monitor.state_dict())
    assert step(model, optimizer, other, batch).step == 10
    assert step(model, optimizer, other, batch).step == pytest.approx(11)
