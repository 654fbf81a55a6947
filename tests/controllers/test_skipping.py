"""A step with a bad gradient is left out, as if its batch had not been drawn."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import geomwatch
from geomwatch.controllers import LearningRateCap, SkipStep
from geomwatch.errors import UsageError

WEIRD = {12: math.nan, 15: 1e6, 16: math.inf}  # step -> what its inputs are multiplied by


class Counting(torch.optim.Optimizer):
    """Plain descent that counts its steps in the group, as optimizers of other libraries do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        group = self.param_groups[0]
        group["k"] += 1
        for param in group["params"]:
            if param.grad is not None:
                param.sub_(group["lr"] / group["k"] * param.grad)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "other": Counting,
}


def batches(bad: dict[int, float]) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    rows = [torch.randn(16, 4, generator=draws) for _ in range(20)]
    return [row * bad.get(t, 1.0) for t, row in enumerate(rows)]


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch[:, :1]).square().mean()


def run(kind: str, controllers: Any, *, leave_out: Any = (), closure: bool = False, bad=WEIRD):
    """Train; steps to `leave_out` are not taken by the loop itself."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = OPTIMIZERS[kind](model.parameters())
    monitor = geomwatch.Monitor(model, square, optimizer, controllers=controllers)
    for t, batch in enumerate(batches(bad)):

        def evaluate(batch: torch.Tensor = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = square(model, batch)
            loss.backward()
            monitor.step(batch, loss=loss.detach())
            return loss

        if closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            if t not in leave_out:
                optimizer.step()
    monitor.close()
    return model, optimizer, monitor


def state_of(model: nn.Module, optimizer: Any) -> list[Any]:
    return [*model.parameters(), *torch.utils._pytree.tree_leaves(optimizer.state_dict())]


def equal(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize(
    ("kind", "closure"), [(kind, False) for kind in OPTIMIZERS] + [("adamw", True)]
)
def test_a_bad_gradient_changes_neither_the_weights_nor_the_optimizer(kind, closure):
    model, optimizer, monitor = run(kind, SkipStep(), closure=closure)
    expected = run(kind, (), leave_out=WEIRD)
    assert equal(state_of(model, optimizer), state_of(*expected[:2]))
    assert [(a.step, a.before, a.after) for a in monitor.adjustments] == [
        (t, 0.0, 1.0) for t in WEIRD
    ]
    first, second, third = (a.reason for a in monitor.adjustments)
    assert "the gradient of the batch of step 12 is not finite (norm nan)" in first
    assert "the gradient of the batch of step 15 has a norm of" in second
    assert "x the largest of the last ones" in second
    assert "step 16 is not finite" in third
    assert all(p.grad is not None for p in model.parameters())  # they are the loop's


def test_a_run_without_one_is_what_it_is_without_it():
    skipping, plain = run("sgd", SkipStep(), bad={}), run("sgd", (), bad={})
    assert equal(state_of(*skipping[:2]), state_of(*plain[:2]))
    assert not skipping[2].adjustments


def test_a_dry_run_says_what_would_be_skipped():
    dry, plain = (
        run("adamw", SkipStep(dry_run=True), bad={15: 1e6}),
        run("adamw", (), bad={15: 1e6}),
    )
    assert equal(state_of(*dry[:2]), state_of(*plain[:2]))
    assert [(a.step, a.effect) for a in dry[2].adjustments] == [(15, "dry run")]


def test_so_many_in_a_row_are_no_bad_batch():
    _, _, monitor = run("sgd", SkipStep(in_a_row=2), bad=dict.fromkeys(range(15, 20), 1e4))
    assert [(a.step, a.effect) for a in monitor.adjustments][:3] == [
        (15, "applied"),
        (16, "applied"),
        (17, "advice"),
    ]
    assert "2 steps in a row were skipped: what comes now is taken" in monitor.adjustments[2].reason


def test_its_memory_is_kept():
    first, second = SkipStep(), SkipStep()
    first._norms.extend([1.0, 2.0])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize("options", [{"times": 1.0}, {"in_a_row": 0}])
def test_what_cannot_be_a_setting_is_refused(options):
    with pytest.raises(UsageError, match=r"must be (a number above 1|an integer >= 1)"):
        SkipStep(**options)


def test_an_optimizer_that_evaluates_its_gradients_again_is_refused():
    model = nn.Linear(4, 1)
    with pytest.raises(UsageError, match="LBFGS, which evaluates its gradients again"):
        geomwatch.Monitor(
            model, square, torch.optim.LBFGS(model.parameters()), controllers=SkipStep()
        )


def test_a_cap_on_an_optimizer_without_a_formula_abstains_once_by_name():
    """Beside it a step is left out all the same."""
    _, _, monitor = run("other", [LearningRateCap(), SkipStep()], bad={12: math.nan})
    abstained, skipped = monitor.adjustments
    assert (abstained.knob, abstained.effect) == ("lr_scale", "abstains")
    assert "LearningRateCap does nothing here: there is no stability formula for Counting" in (
        abstained.reason
    )
    assert (skipped.knob, skipped.step) == ("skip_step", 12)
