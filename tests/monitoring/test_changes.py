"""What trains changes in mid-run: from the next look on what trains now is measured."""

from __future__ import annotations

import gc
import itertools
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loops import HandMade, draws, sgd, train, weights
from problems import cross_entropy, dense_hessian, mlp
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import geomwatch
from geomwatch import Measurement, Monitor
from geomwatch.controllers import LearningRateCap
from geomwatch.monitoring.changes import Changes

Batch = tuple[Tensor, Tensor]
Change = Callable[[nn.Sequential, Any], Any]  # returns the optimizer that steps from now on


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO, logger="geomwatch"):
        yield


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(64, 8, 6, 10, activation=nn.Tanh)


def frozen_body() -> tuple[nn.Sequential, torch.optim.SGD]:
    model = net()
    model[:4].requires_grad_(False)
    return model, torch.optim.SGD(model[4].parameters(), lr=0.05)


def whole() -> tuple[nn.Sequential, torch.optim.SGD]:
    model = net()
    return model, torch.optim.SGD(model.parameters(), lr=0.05)


def exact(model: nn.Module, optimizer: Any, batch: Batch) -> tuple[float, float]:
    """lambda_max of what requires grad, and half that of sqrt(lr) H sqrt(lr), from a dense H."""
    rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    each = [
        torch.full((p.numel(),), rates.get(p, 0.0) if p.requires_grad else -1.0).double()
        for p in model.parameters()
    ]
    root = torch.cat(each)
    kept = root >= 0
    hessian = dense_hessian(model, batch)[kept][:, kept]
    root = root[kept].sqrt()
    scaled = root[:, None] * hessian * root
    return torch.linalg.eigvalsh(hessian)[-1].item(), torch.linalg.eigvalsh(scaled)[-1].item() / 2


def unfreeze(model: nn.Sequential, optimizer: Any) -> Any:
    model.requires_grad_(True)
    optimizer.add_param_group({"params": list(model[:4].parameters()), "lr": 0.5})
    return optimizer


def freeze(model: nn.Sequential, optimizer: Any) -> Any:
    model[:2].requires_grad_(False)
    for p in model[:2].parameters():
        p.grad = None
    return optimizer


def new_head(model: nn.Sequential, optimizer: Any) -> Any:
    old = list(model[4].parameters())
    torch.manual_seed(7)
    model[4] = nn.Linear(6, 10)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if all(p is not o for o in old)]
    optimizer.add_param_group({"params": list(model[4].parameters()), "lr": 0.2})
    return optimizer


def another_rate(model: nn.Sequential, optimizer: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.4)


def two_groups(model: nn.Sequential, optimizer: Any) -> Any:
    groups = [
        {"params": list(model[:2].parameters()), "lr": 0.3},
        {"params": list(model[2:].parameters())},
    ]
    return torch.optim.SGD(groups, lr=0.02)


KINDS: dict[str, tuple[Callable[[], Any], Change, str]] = {
    "unfrozen": (frozen_body, unfreeze, r"4 parameters are trained now .*2 groups instead of 1"),
    "frozen": (whole, freeze, "2 parameters are no longer trained"),
    "a new head": (whole, new_head, r"2 parameters are now another tensor \(4.weight, 4.bias\)"),
    "in float64": (
        whole,
        lambda model, optimizer: (model.double(), optimizer)[1],
        "6 parameters are now torch.float64 instead of torch.float32",
    ),
    "a new optimizer": (whole, another_rate, "the optimizer is another SGD"),
    "a new optimizer of two groups": (whole, two_groups, "the optimizer is another SGD"),
}


def run(
    make: Callable[[], tuple[nn.Sequential, Any]], change: Change, *, watched: bool = True
) -> tuple[nn.Sequential, Monitor | None, list[tuple[Any, tuple[float, float]]]]:
    """Train 50 steps, with a change at step 24; each record with what is exact at its point."""
    model, optimizer = make()
    monitor = Monitor(model, cross_entropy, optimizer, every=20) if watched else None
    found = []
    for step, batch in enumerate(itertools.islice(draws(), 50)):
        if step == 24:
            optimizer = change(model, optimizer)
        if next(model.parameters()).dtype == torch.float64:
            batch = batch[0].double(), batch[1]
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        if monitor is not None:
            record = monitor.step(batch, loss=loss.detach())
            if record is not None and step >= 24:
                found.append((record, exact(model, optimizer, batch)))
        optimizer.step()
    return model, monitor, found


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_told_in_a_phrase(kind):
    make, change, said = KINDS[kind]
    model, optimizer = make()
    changes = Changes(model, None, optimizer)
    assert changes.look(optimizer) == []
    assert re.search(said, "; ".join(changes.look(change(model, optimizer))))


@pytest.mark.parametrize("kind", ["unfrozen", "a new optimizer of two groups"])
def test_what_trains_now_is_measured_as_the_dense_hessian_has_it(kind, caplog):
    make, change, said = KINDS[kind]
    _, monitor, found = run(make, change)
    assert monitor is not None
    first, _ = found[0]
    assert first.step < 44  # within the interval
    assert not [e for e in first.estimates.values() if e.status == "held"]
    for record, (top, margin) in found:
        assert record["stability_margin"].value == pytest.approx(margin, rel=0.05)
        if record["lambda_max"].status != "held":
            assert record["lambda_max"].value == pytest.approx(top, rel=0.05)
    lines = [r.getMessage() for r in caplog.records if "Measured anew" in r.getMessage()]
    assert len(lines) == 1
    assert re.search(said, lines[0])


def test_training_is_the_same_with_the_monitor_on_across_a_change():
    make, change, _ = KINDS["a new head"]
    watched, _, _ = run(make, change)
    bare, _, _ = run(make, change, watched=False)
    assert torch.equal(weights(watched), weights(bare))


def test_a_new_optimizer_is_found_by_itself_and_its_steps_are_counted(caplog):
    _, monitor, found = run(whole, another_rate)
    assert monitor is not None
    said = [r.getMessage() for r in caplog.records if "no longer steps" in r.getMessage()]
    assert len(said) == 1
    assert "SGD does, and is followed from now on" in said[0]
    assert [record.step for record, _ in found][:2] == [27, 40]
    assert monitor.state_dict()["step"] == 50


def test_an_optimizer_that_is_followed_by_request_is_probed_at_once_under_its_own_rule():
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer, every=1000)
    batches = draws()
    train(model, optimizer, monitor, 20, batches=batches)
    after = torch.optim.Adam(model.parameters(), lr=1e-3)
    monitor.follow(after)
    assert train(model, after, monitor, 1, batches=batches)[0].step == 20
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(geomwatch.UsageError, match="optimizer must be the torch optimizer in use"):
        monitor.follow("Adam")


def test_a_step_that_a_scaler_leaves_out_is_no_other_optimizer(caplog):
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer)
    for step, batch in enumerate(itertools.islice(draws(), 30)):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        if not 10 <= step < 20:
            optimizer.step()
    assert "no longer steps" not in caplog.text
    assert not _global_optimizer_post_hooks


class Sharp(torch.optim.Optimizer):
    """Sharpness-aware minimisation in two steps, as its widespread implementation has it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


def train_sharp(model: nn.Module, optimizer: Any, monitor: Monitor, first: bool) -> None:
    """Train with monitor.step() before the first of the two steps, or before the second."""
    for batch in itertools.islice(draws(), 30):
        for is_first in (True, False):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            if is_first is first:
                monitor.step(batch)
            optimizer.first_step() if is_first else optimizer.second_step()


@pytest.mark.parametrize(
    ("first", "said"),
    [(True, "the gradient was changed between"), (False, "the weights were moved between")],
)
@pytest.mark.parametrize("of_base", [False, True])
def test_the_base_of_a_sharpness_aware_optimizer_is_found_and_what_it_steps_with_is_told(
    first, said, of_base, caplog
):
    model = net()
    optimizer = Sharp(model.parameters(), lr=0.05)
    monitor = Monitor(model, cross_entropy, optimizer.base_optimizer if of_base else optimizer)
    train_sharp(model, optimizer, monitor, first)
    assert ("the Sharp that monitor knows no longer steps" in caplog.text) != of_base
    assert monitor.history[-1]["stability_margin"].status == "ok"
    assert monitor.state_dict()["step"] == 30
    lines = [r.getMessage() for r in caplog.records if "between monitor.step() and" in r.message]
    assert len(lines) == 1
    assert lines[0].startswith(said)


def test_a_gradient_that_is_clipped_after_it_was_seen_is_told_of(caplog):
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer)
    for batch in itertools.islice(draws(), 3):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    assert "the gradient was changed between monitor.step() and the step of SGD" in caplog.text


def test_optimizers_that_step_in_the_backward_pass_are_told_of(caplog):
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer)
    batches = draws()
    train(model, optimizer, monitor, 10, batches=batches)
    each = {p: torch.optim.SGD([p], lr=0.05) for p in model.parameters()}

    def step(p: Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for batch in itertools.islice(batches, 10):
        cross_entropy(model, batch).backward()
        monitor.step(batch)
    assert "SGD, SGD, SGD, SGD, SGD, SGD does. Build one Monitor for each" in caplog.text


def test_optimizers_that_step_in_the_backward_pass_from_the_start_are_refused():
    model, optimizer = whole()

    def step(p: Tensor) -> None:
        torch.optim.SGD([p], lr=0.05).step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    batch = next(draws())
    cross_entropy(model, batch).backward()
    monitor = Monitor(model, cross_entropy, optimizer)
    with pytest.raises(geomwatch.UsageError, match=r"in the backward pass itself(.|\n)*measure\("):
        monitor.step(batch)


def test_each_of_several_optimizers_has_the_margin_of_its_own_parameters():
    model = net()
    parts = {"body": (model[0], "0.*", 0.5), "head": (model[4], "4.*", 0.1)}
    watched = {}
    for name, (part, pattern, lr) in parts.items():
        how = Measurement(params=pattern)
        optimizer = torch.optim.SGD(part.parameters(), lr=lr)
        watched[name] = Monitor(model, cross_entropy, optimizer, how)
    batch = next(draws())
    cross_entropy(model, batch).backward()
    hessian = dense_hessian(model, batch)
    places = {"body": slice(0, 520), "head": slice(-70, None)}
    for name, (_, _, lr) in parts.items():
        record = watched[name].step(batch)
        own = hessian[places[name], places[name]]
        top = float(torch.linalg.eigvalsh(own)[-1])
        assert record["lambda_max"].value == pytest.approx(top, rel=0.05)
        assert record["stability_margin"].value == pytest.approx(lr * top / 2, rel=0.05)


def test_an_optimizer_of_copies_has_no_margin_and_is_told_of(caplog):
    model = net()
    flat = nn.Parameter(weights(model).clone())
    optimizer = torch.optim.SGD([flat], lr=0.05)
    monitor = Monitor(model, cross_entropy, optimizer, every=5)
    for batch in itertools.islice(draws(), 10):
        model.zero_grad()
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        flat.grad = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
        optimizer.step()
        nn.utils.vector_to_parameters(flat.detach().clone(), model.parameters())
    assert "SGD holds none of the 6 parameters that are measured" in caplog.text
    for record in monitor.history:
        assert record["stability_margin"].status == "withheld"
        assert record["lambda_max"].status in ("ok", "held")
    monitor.close()
    assert "at the end: no margin could be measured in 10 calls" in caplog.text


def test_an_optimizer_of_some_parameters_alone_is_told_of(caplog):
    model = net()
    ours = torch.optim.SGD(model[:2].parameters(), lr=0.05)
    monitor = Monitor(model, cross_entropy, ours)
    train(model, ours, monitor, 3)
    assert "SGD does not hold 4 of the 6 parameters that are measured (2.weight," in caplog.text
    own = Monitor(model, cross_entropy, ours, Measurement(params=["0.*"]))
    caplog.clear()
    train(model, ours, own, 3)
    assert "does not hold" not in caplog.text


def test_a_run_that_freezes_everything_goes_on_and_is_measured_again_when_it_trains(caplog):
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer, every=5)
    batches = draws()
    train(model, optimizer, monitor, 10, batches=batches)
    model.requires_grad_(False)
    for batch in itertools.islice(batches, 10):
        monitor.step(batch)
        optimizer.step()
    assert "nothing can be measured until this is mended: model must have" in caplog.text
    model.requires_grad_(True)
    train(model, optimizer, monitor, 10, batches=batches)
    assert monitor.history[-1].step >= 20


def test_two_monitors_with_controllers_on_one_optimizer_are_refused():
    model, optimizer = whole()
    first = Monitor(model, cross_entropy, optimizer, controllers=LearningRateCap())
    with pytest.raises(geomwatch.UsageError, match="a second monitor with controllers on one SGD"):
        Monitor(model, cross_entropy, optimizer, controllers=LearningRateCap())
    Monitor(model, cross_entropy, optimizer)  # watches alone
    Monitor(model, cross_entropy, optimizer, controllers=LearningRateCap(dry_run=True))
    first.close()
    Monitor(model, cross_entropy, optimizer, controllers=LearningRateCap())


def test_hooks_are_taken_off_when_a_monitor_is_forgotten():
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer, controllers=LearningRateCap())
    train(model, optimizer, monitor, 3)
    assert optimizer._optimizer_step_post_hooks
    del monitor
    gc.collect()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_controller_goes_on_with_the_optimizer_that_is_followed():
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer, every=5, controllers=LearningRateCap())
    batches = draws()
    train(model, optimizer, monitor, 10, batches=batches)
    after = sgd(model)
    monitor.follow(after)
    assert after._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    train(model, after, monitor, 10, batches=batches)
    assert monitor.state_dict()["step"] == 20


def test_an_optimizer_without_hooks_can_be_followed():
    model, optimizer = whole()
    monitor = Monitor(model, cross_entropy, optimizer, every=5)
    batches = draws()
    train(model, optimizer, monitor, 10, batches=batches)
    after = HandMade(model, lr=0.05)
    monitor.follow(after)
    train(model, after, monitor, 10, batches=batches)
    assert monitor.history[-1].step == 15
    assert monitor.history[-1]["stability_margin"].status == "unknown"
