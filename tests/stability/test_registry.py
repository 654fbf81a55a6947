"""An optimizer class that says which known one it steps like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import geomwatch
from geomwatch.records import Estimate, Record
from geomwatch.stability import registry
from geomwatch.stability.problem import cold_start, learning_rates, stability_of
from geomwatch.vectors.layout import Layout


class Mine(torch.optim.Optimizer):
    """AdamW under names of its own, the second moment kept as its root."""

    def __init__(self, params: Any, rate: float = 0.1) -> None:
        super().__init__(params, {"rate": rate, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, (b1, b2) = self.state[p], group["betas"]
                t = state["step"] = state.get("step", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(p))
                root = state.setdefault("root", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - b1)
                root.copy_((b2 * root.square() + (1 - b2) * p.grad.square()).sqrt())
                p.sub_(group["rate"] * mean / (1 - b1**t) / (root / (1 - b2**t) ** 0.5 + 1e-8))


def at_second_step(cls: Any, **options: Any) -> tuple[Any, Layout]:
    w = torch.linspace(1, 2, 5, requires_grad=True)
    optimizer = cls([w], **options)
    for _ in range(2):
        w.grad = 3 * w.detach()
        optimizer.step()
    return optimizer, Layout(("w",), (w,))


@pytest.fixture
def registered() -> Iterator[None]:
    geomwatch.register_optimizer(
        Mine,
        like="AdamW",
        state={"exp_avg": "mean", "exp_avg_sq": lambda state: state["root"].square()},
        options={"lr": "rate"},
    )
    yield
    registry._REGISTERED.clear()


@pytest.mark.usefixtures("registered")
def test_a_registered_optimizer_has_the_margin_of_what_it_is_like():
    (mine, layout), (adamw, its) = (
        at_second_step(Mine, rate=0.1),
        at_second_step(torch.optim.AdamW, lr=0.1, weight_decay=0.0),
    )
    found, expected = stability_of(mine, layout), stability_of(adamw, its)
    assert found.status == "ok"
    torch.testing.assert_close(found.scale, expected.scale)
    assert learning_rates(mine) == (0.1,)
    assert cold_start(mine, 0) == pytest.approx(10)


def test_one_that_is_not_has_none():
    optimizer, layout = at_second_step(Mine)
    problem = stability_of(optimizer, layout)
    assert problem.status == "unknown"
    assert "no stability formula for Mine.step" in problem.reason


@pytest.mark.parametrize(
    ("cls", "options", "said"),
    [
        (object(), {"like": "AdamW"}, "cls must be the optimizer's class"),
        (Mine, {"like": "AdamWW"}, "like='AdamW'"),
        (Mine, {"like": "Muon"}, "like must be one of"),
        (Mine, {"like": "AdamW", "state": {"exp_avg_square": "v"}}, "state={'exp_avg_sq': 'v'}"),
        (Mine, {"like": "SGD", "options": {"rate": "lr"}}, "options must name what SGD reads"),
    ],
)
def test_an_entry_that_can_not_work_is_refused(cls, options, said):
    with pytest.raises(geomwatch.UsageError, match=said):
        geomwatch.register_optimizer(cls, **options)
    assert not registry._REGISTERED


def test_a_margin_without_a_limit_reaches_trackers_under_another_name():
    margin = {"stability_margin": Estimate(3.0, status="directional"), "trace": Estimate(2.0)}
    margin["stochastic_margin"] = Estimate(4.0, status="directional")
    scalars = Record(0, 1.0, (0.1,), 0.1, margin).scalars()
    assert scalars["geom/lr_lambda_max"] == 3
    assert scalars["geom/trace"] == 2
    assert not [name for name in scalars if "margin" in name]
