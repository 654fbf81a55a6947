"""The critical learning rate against parabolas, and steps that have none."""

from __future__ import annotations

import pytest
import torch
from problems import Quadratic, cross_entropy, digits, mlp, quadratic_loss, wishart

import geomwatch
from geomwatch.estimators.critical_lr import critical_lr
from geomwatch.estimators.noise_floor import Readout

ONES = torch.ones(4, dtype=torch.float64)


class Parabola:
    """L(d) = 2 - slope x + curvature x^2 / 2 along the first axis, x = -d_0; counts its calls."""

    def __init__(self, slope: float, curvature: float) -> None:
        self.slope, self.curvature, self.calls = slope, curvature, 0

    def __call__(self, d: torch.Tensor) -> float:
        self.calls += 1
        x = -float(d[0])
        return 2 - self.slope * x + self.curvature * x**2 / 2


AXIS = torch.tensor([1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("start", [1e-3, 0.07, 0.4, 0.5, 3.0, 1e4])
@pytest.mark.parametrize("bisections", [3, 5, 20])
def test_a_parabola_crosses_within_the_error(start, bisections):
    loss = Parabola(slope=1.0, curvature=5.0)
    found = critical_lr(
        loss, AXIS, Readout(2.0, 1e-15), slope=1.0, start=start, bisections=bisections
    )
    assert found.value == pytest.approx(2 / 5, abs=found.error * (1 + 1e-9))
    assert found.error <= found.value / (1.9 * 2**bisections)
    assert found.error_kind == "residual"


def test_it_costs_as_many_evaluations_as_it_says():
    loss = Parabola(slope=1.0, curvature=5.0)
    critical_lr(loss, AXIS, Readout(2.0, 1e-15), slope=1.0, start=0.15)
    assert loss.calls == 1 + 2 + 5  # at start, two doublings, five bisections


def test_the_noise_of_the_loss_goes_into_the_error():
    floor = 0.01
    found = critical_lr(
        Parabola(1.0, 5.0), AXIS, Readout(2.0, floor), slope=1.0, start=0.3, bisections=12
    )
    assert found.error == pytest.approx(floor, rel=0.1)  # floor / slope
    assert found.value == pytest.approx(0.4, abs=found.error)


def test_an_ascent_direction_is_withheld():
    found = critical_lr(Parabola(-1.0, 5.0), AXIS, Readout(2.0, 1e-15), slope=-1.0, start=1.0)
    assert (found.value, found.status) == (None, "withheld")
    assert "not a descent direction" in found.reason


def test_a_loss_that_only_falls_has_none():
    found = critical_lr(Parabola(1.0, -1.0), AXIS, Readout(2.0, 1e-15), slope=1.0, start=1.0)
    assert found.status == "withheld"
    assert "no crossing found: along the step the loss falls" in found.reason


def test_a_loss_that_rises_at_once_has_none():
    found = critical_lr(
        lambda d: 2 + float(d.abs().sum()), AXIS, Readout(2.0, 1e-15), slope=1.0, start=1.0
    )
    assert found.status == "withheld"
    assert "the loss rises from" in found.reason


def test_a_dip_below_the_noise_is_withheld():
    loss = Parabola(slope=1e-3, curvature=5e-3)
    found = critical_lr(loss, AXIS, Readout(2.0, 1e-3), slope=1e-3, start=1.0)
    assert found.status == "withheld"
    assert "below its noise floor" in found.reason


def test_a_loss_that_overflows_counts_as_risen():
    def loss(d: torch.Tensor) -> float:
        x = -float(d[0])
        return float("nan") if x > 0.3 else 2 - x

    found = critical_lr(loss, AXIS, Readout(2.0, 1e-15), slope=1.0, start=1.0)
    assert found.value == pytest.approx(0.3, abs=found.error)


def test_without_an_optimizer_it_is_two_over_the_curvature_along_the_gradient():
    matrix = wishart(30, seed=4)
    model = Quadratic(matrix, torch.randn(30, dtype=torch.float64))
    record = geomwatch.measure(
        model,
        quadratic_loss,
        ONES,
        how=geomwatch.Measurement(quantities=["critical_lr", "batch_sharpness"]),
    )
    g = matrix @ model.w.detach()
    exact = 2 * float(g @ g / (g @ matrix @ g))
    found = record["critical_lr"]
    assert found.value == pytest.approx(exact, abs=found.error)
    assert found.error < 0.012 * exact
    assert found.value == pytest.approx(2 / record["batch_sharpness"].value, rel=0.02)


@pytest.mark.parametrize("lr", [1e-3, 0.5, 20.0])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}, {"maximize": True}]
)
def test_under_sgd_it_depends_neither_on_lr_nor_on_momentum(lr, options):
    matrix = wishart(20, seed=5)
    model = Quadratic(-matrix if options.get("maximize") else matrix)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
    found = geomwatch.measure(
        model,
        quadratic_loss,
        ONES,
        how=geomwatch.Measurement(quantities=["critical_lr"]),
        optimizer=optimizer,
    )["critical_lr"]
    g = matrix @ model.w.detach()
    assert found.value == pytest.approx(2 * float(g @ g / (g @ matrix @ g)), abs=found.error)


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_under_adam_it_is_along_the_preconditioned_gradient(lr):
    matrix = wishart(20, seed=6)
    model = Quadratic(matrix, 3 + torch.rand(20, dtype=torch.float64))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(3):
        optimizer.zero_grad()
        model(ONES).backward()
        optimizer.step()
    found = geomwatch.measure(
        model,
        quadratic_loss,
        ONES,
        how=geomwatch.Measurement(quantities=["critical_lr"]),
        optimizer=optimizer,
    )["critical_lr"]
    g = matrix @ model.w.detach()
    state = optimizer.state[model.w]
    v = 0.999 * state["exp_avg_sq"] + 0.001 * g**2
    p = (v / (1 - 0.999**4)).sqrt() + 1e-8
    d = g / p.maximum(p.median())  # the margin's damping
    exact = 2 * float(g @ d / (d @ matrix @ d))
    assert found.value == pytest.approx(exact, rel=0.02)


def test_with_two_groups_it_is_in_units_of_the_larger_rate():
    matrix = torch.diag(torch.tensor([1.0, 4.0, 2.0, 3.0], dtype=torch.float64))

    class Halves(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))

    def loss_fn(model, batch):
        w = torch.cat([model.a, model.b])
        return batch.mean() * w @ matrix @ w / 2

    model = Halves()
    groups = [{"params": [model.a], "lr": 0.1}, {"params": [model.b], "lr": 0.025}]
    found = geomwatch.measure(
        model,
        loss_fn,
        ONES,
        how=geomwatch.Measurement(quantities=["critical_lr"]),
        optimizer=torch.optim.SGD(groups),
    )["critical_lr"]
    g = matrix @ ONES
    d = g * torch.tensor([1.0, 1.0, 0.25, 0.25])
    assert found.value == pytest.approx(2 * float(g @ d / (d @ matrix @ d)), abs=found.error)


def test_an_optimizer_without_a_formula_is_marked():
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.Rprop(model.parameters())
    found = geomwatch.measure(
        model,
        cross_entropy,
        batch,
        how=geomwatch.Measurement(quantities=["critical_lr"]),
        optimizer=optimizer,
    )["critical_lr"]
    assert found.value is not None
    assert found.status in ("unknown", "directional")
    assert found.reason


def test_gradient_descent_above_it_raises_the_loss_of_a_real_net_and_below_it_does_not():
    model, batch = mlp(64, 32, 10), digits(256)
    found = geomwatch.measure(
        model, cross_entropy, batch, how=geomwatch.Measurement(quantities=["critical_lr"])
    )
    critical = found["critical_lr"]
    losses = []
    for lr in (critical.value + 2 * critical.error, critical.value - 2 * critical.error):
        before = [p.detach().clone() for p in model.parameters()]
        loss = cross_entropy(model, batch)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.sub_(lr * g)
            losses.append(float(cross_entropy(model, batch) - loss))
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
    assert losses[0] > 0 > losses[1]
