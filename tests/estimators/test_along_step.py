"""Sentinels: the margin along the coming step from forward passes, between probes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

from geomwatch import Monitor
from geomwatch.curvature.objective import Objective
from geomwatch.estimators.along_step import Point, Sentinel
from geomwatch.observation.margins import Margin
from geomwatch.records import Estimate
from geomwatch.rules import Observation
from geomwatch.stability.problem import cold_start, learning_rates, planned_rates, stability_of
from geomwatch.vectors.layout import Layout

EIGENVALUES = torch.tensor([4.0, 1.0, 0.25, 0.0])


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (EIGENVALUES.to(self.w) * self.w**2).sum() * x.mean()


def quadratic_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def at_a_step(optimizer_of: Any) -> tuple[Quadratic, Layout, Any, Tensor, Tensor]:
    model, batch = Quadratic(), torch.ones(8, dtype=torch.float64)
    optimizer = optimizer_of(model.parameters())
    quadratic_loss(model, batch).backward()
    layout = Layout.of(model)
    return model, layout, optimizer, layout.flatten([p.grad for p in layout.params]), batch


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_is_eta_bs_over_2_of_a_quadratic(is_own, momentum):
    model, layout, optimizer, g, batch = at_a_step(
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=momentum)
    )
    sharpness = float((g * EIGENVALUES * g).sum() / g.square().sum())
    sentinel = Sentinel()
    sentinel.note(0.01)  # something to choose a distance by
    with Objective(model, quadratic_loss, [batch], products=False) as objective:
        point = Point(stability_of(optimizer, layout, gradient=g), g, is_own)
        found = sentinel.measure(objective.loss_at, point)
    assert found.value == pytest.approx(0.1 * sharpness / (2 * (1 - momentum)), rel=1e-6)


def test_coupled_weight_decay_counts_as_curvature():
    model, layout, optimizer, g, batch = at_a_step(
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5)
    )
    stability = stability_of(optimizer, layout, gradient=g)
    with Objective(model, quadratic_loss, [batch], products=False) as objective:
        found = Sentinel().measure(objective.loss_at, Point(stability, g))
    sharpness = float((g * (EIGENVALUES + 0.5) * g).sum() / g.square().sum())
    assert found.value == pytest.approx(0.1 * sharpness / 2, rel=1e-6)


def test_a_concave_direction_is_negative():
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)

    def concave(net: nn.Module, batch: Tensor) -> Tensor:
        return -(net.weight**2).sum() * batch.mean()

    batch = torch.ones(4, dtype=torch.float64)
    concave(model, batch).backward()
    layout = Layout.of(model)
    g = layout.flatten([p.grad for p in layout.params])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Objective(model, concave, [batch], products=False) as objective:
        found = Sentinel().measure(
            objective.loss_at, Point(stability_of(optimizer, layout, gradient=g), g)
        )
    assert found.value == pytest.approx(-0.1, rel=1e-6)


def test_a_slope_that_is_not_the_losss_own_is_found_out():
    model, layout, optimizer, g, batch = at_a_step(lambda p: torch.optim.SGD(p, lr=0.1))
    sharpness = float((g * EIGENVALUES * g).sum() / g.square().sum())
    sentinel = Sentinel()
    clipped = 0.01 * g  # what a step after clipping would use, taken for the whole gradient
    sentinel.note(0.05 * sharpness)
    with Objective(model, quadratic_loss, [batch], products=False) as objective:
        point = Point(stability_of(optimizer, layout, gradient=clipped), clipped, is_own=True)
        found = sentinel.measure(objective.loss_at, point)
    # along the same direction; three forward passes do not need the slope's size
    assert found.value is not None
    assert found.value > 0.04 * sharpness


@pytest.mark.parametrize("gradient", [0.0, math.nan])
def test_without_a_direction_it_is_withheld(gradient):
    model, layout, optimizer, g, batch = at_a_step(lambda p: torch.optim.SGD(p, lr=0.1))
    with Objective(model, quadratic_loss, [batch], products=False) as objective:
        stability = stability_of(optimizer, layout, gradient=g)
        found = Sentinel().measure(objective.loss_at, Point(stability, gradient * g))
    assert found.value is None
    assert "zero or not finite" in found.reason


def test_a_loss_that_differentiates_itself_can_be_read_without_a_graph_of_ours():
    model = mlp(64, 16, 10).double()
    x, y = digits(32)
    batch = (x.double(), y)

    def penalised(net: nn.Module, b: Any) -> Tensor:
        inputs = b[0].clone().requires_grad_()
        loss = nn.functional.cross_entropy(net(inputs), b[1])
        (slope,) = torch.autograd.grad(loss, inputs, create_graph=True)
        return loss + slope.square().sum()

    with Objective(model, penalised, [batch], products=False) as objective:
        zero = objective.layout.zeros()
        assert objective.loss_at(zero) == pytest.approx(objective.loss(), rel=1e-12)


# In a monitor


class Seeing:
    """A rule that keeps what it sees."""

    name = "seeing"

    def __init__(self) -> None:
        self.seen: list[Observation] = []

    def __call__(self, seen: Observation) -> None:
        self.seen.append(seen)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def watch(steps: int, optimizer_of: Any, *, give_loss: bool = True) -> list[Observation]:
    torch.manual_seed(0)
    model = mlp(64, 32, 10)
    optimizer = optimizer_of(model.parameters())
    rule = Seeing()
    monitor = Monitor(model, cross_entropy, optimizer, rules=[rule])
    x, y = digits(256)
    batches = [(x[i::4], y[i::4]) for i in range(4)]
    for t in range(steps):
        batch = batches[t % 4]
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss if give_loss else None)
        optimizer.step()
    return rule.seen


@pytest.mark.parametrize("give_loss", [True, False])
def test_rules_see_a_fresh_margin_along_the_gradient_between_probes(give_loss):
    seen = watch(60, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), give_loss=give_loss)
    between = [s for s in seen if s.gradient_fresh and not s.fresh]
    assert len(between) >= 2
    assert all(s.gradient_margin.value is not None for s in between)
    assert all(s.gradient_fresh for s in seen if s.fresh)


def test_adam_s_cold_start_is_told_apart():
    seen = watch(12, lambda p: torch.optim.Adam(p, lr=1e-3))
    assert seen[0].cold_start == pytest.approx(10)
    looked = [s for s in seen if s.gradient_fresh]  # it is that of the margin
    assert looked[-1].index > 3
    assert all(s.cold_start == pytest.approx(1 / (1 - 0.9 ** (s.index + 1))) for s in looked)
    assert watch(2, lambda p: torch.optim.SGD(p, lr=0.1))[0].cold_start == 1


def test_the_rates_a_scheduler_is_headed_for_are_known():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.4)
    assert planned_rates(optimizer, learning_rates(optimizer)) == (0.4,)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.04)
    assert planned_rates(optimizer, learning_rates(optimizer)) == pytest.approx((0.4,))
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.4)
    torch.optim.lr_scheduler.OneCycleLR(other, max_lr=3.0, total_steps=100)
    assert planned_rates(other, learning_rates(other)) == pytest.approx((3.0,))


def test_cold_start_is_that_of_the_stability_problem():
    model, layout, optimizer, g, _ = at_a_step(lambda p: torch.optim.Adam(p, lr=0.1))
    warm = stability_of(optimizer, layout, gradient=g).scale
    cold = stability_of(optimizer, layout, gradient=g, cold_start=True).scale
    assert float((cold / warm).max()) ** 2 == pytest.approx(cold_start(optimizer, 0), rel=1e-6)
    assert len(list(model.parameters())) == 1


def test_a_held_margin_follows_the_learning_rate():
    assert Margin().at((0.1,)) is None
    held = Margin(Estimate(0.5, 0.1, "residual"), (0.1,))
    assert held.at((0.1,)).value == 0.5
    assert held.at((0.4,)).value == pytest.approx(2.0)
    assert held.at((0.4,)).error == pytest.approx(0.4)
    assert held.at((0.1, 0.4)).value == 0.5  # of a group that was not there nothing is known
