"""Roughness against parabolas and ripples in closed form, and losses that can't be read."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.estimators.noise_floor import Readout, read_out
from geomwatch.estimators.roughness import (
    Slices,
    filter_normalised,
    micro_scale,
    roughness,
    roughness_residual,
    take_slices,
)
from geomwatch.vectors.layout import Layout

QUANTITIES = ["roughness", "roughness_residual"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layout_of(*shapes: tuple[int, ...]) -> Layout:
    params = tuple(torch.randn(s, dtype=torch.float64) for s in shapes)
    return Layout(tuple(f"layer{i}" for i in range(len(params))), params)


def slices_of(loss_at, layout: Layout, **options) -> Slices:
    readout = read_out(loss_at, layout, rng=generator(9))
    return take_slices(loss_at, layout, readout, rng=generator(), **options)


def parabola(dim: int):
    """L(d) = 3 + g'd + d'Hd / 2 with its g and H."""
    g = torch.randn(dim, dtype=torch.float64)
    factor = torch.randn(dim, dim, dtype=torch.float64)
    matrix = factor @ factor.T / dim
    return (lambda d: float(3 + g @ d + d @ matrix @ d / 2)), g, matrix


def test_a_filter_of_the_direction_is_as_long_as_that_of_the_weights():
    layout = layout_of((4, 3, 2), (5, 7), (6,))
    v = filter_normalised(layout, generator())
    conv, linear, bias = layout.unflatten(v)
    for piece, p in [(conv, layout.params[0]), (linear, layout.params[1])]:
        assert torch.allclose(piece.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1))
    assert not bias.any()


def test_a_parabola_has_its_closed_form_and_no_residual():
    layout = layout_of((4, 5), (3, 4), (3,))
    loss_at, g, matrix = parabola(layout.dim)
    slices = slices_of(loss_at, layout)
    rng = generator()
    expected = []
    for _ in range(4):
        v = filter_normalised(layout, rng)
        a = torch.linspace(-0.05, 0.05, 11, dtype=torch.float64)
        spread = a.pow(4).mean() - a.square().mean() ** 2
        slope, curvature = v @ g, v @ matrix @ v
        expected.append(float(slope**2 * a.square().mean() + curvature**2 / 4 * spread))
    found = roughness(slices)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.error == pytest.approx(np.std(expected, ddof=1) / 2, rel=1e-9)
    assert found.error_kind == "stderr"
    rest = roughness_residual(slices)
    assert rest.status == "withheld"
    assert "beside a parabola" in rest.reason
    exact = Slices(slices.alphas, slices.losses, Readout(slices.readout.loss, 0.0))
    assert 0 < roughness_residual(exact).value < 1e-8


def test_a_cubic_leaves_the_residual_that_algebra_says():
    a = np.linspace(-1, 1, 9)
    slices = Slices(0.05 * a, np.stack([a**2 + a**3, a**2 + a**3]), Readout(0.0, 1e-15))
    line = a @ a**3 / (a @ a)  # a^3 is odd: only the linear part of the fit takes from it
    left = ((a**3 - line * a) ** 2).sum() / (9 - 3)
    found = roughness_residual(slices)
    assert found.value == pytest.approx(left / (a**2 + a**3).var(), rel=1e-9)
    assert found.error == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("amplitude", [1e-4, 1e-2])
def test_a_ripple_is_recovered_by_the_micro_scale(amplitude):
    layout = layout_of((8, 8))
    smooth, _, _ = parabola(layout.dim)
    k = 3_000 * torch.randn(layout.dim, dtype=torch.float64)

    def loss_at(d):
        return smooth(d) + amplitude * math.sin(float(k @ d) + 1)

    found = micro_scale(slices_of(loss_at, layout, directions=24))
    assert found * math.sqrt(2) == pytest.approx(amplitude, rel=0.2)
    assert micro_scale(slices_of(smooth, layout)) < 1e-6 * amplitude


def test_white_noise_is_all_residual_and_its_own_micro_scale():
    noise = np.random.default_rng(0).normal(scale=0.3, size=(200, 11))
    slices = Slices(np.linspace(-0.05, 0.05, 11), noise, Readout(0.0, 1e-12))
    assert roughness_residual(slices).value == pytest.approx(1.0, abs=0.15)
    assert micro_scale(slices) == pytest.approx(0.3, rel=0.05)


def test_a_kinked_net_is_rougher_than_a_smooth_one():
    residuals = {}
    for activation in (nn.ReLU, nn.Tanh):
        torch.manual_seed(1)
        model, batch = mlp(64, 32, 32, 10, activation=activation).double(), digits(256)
        batch = batch[0].double(), batch[1]
        train(model, batch, steps=100)
        record = geomwatch.measure(
            model, cross_entropy, batch, how=geomwatch.Measurement(quantities=QUANTITIES)
        )
        assert record["roughness"].value > 0
        residuals[activation] = record["roughness_residual"]
    assert residuals[nn.ReLU].value > 5 * residuals[nn.Tanh].value
    assert residuals[nn.ReLU].value < 0.01
    assert "micro-scale" in residuals[nn.ReLU].reason


def test_it_leaves_the_weights_where_they_were():
    model, batch = mlp(64, 16, 10), digits(64)
    before = [p.detach().clone() for p in model.parameters()]
    geomwatch.measure(model, cross_entropy, batch, how=geomwatch.Measurement(quantities=QUANTITIES))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class PrivateDropout(nn.Module):
    """Dropout from a generator that is made on the fly, so nobody can replay it."""

    calls = iter(range(10**6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rng = generator(next(PrivateDropout.calls))
        return x * 2 * torch.randint(0, 2, x.shape, generator=rng)


def test_dropout_that_cannot_be_replayed_is_refused():
    batch = digits(128)
    net = nn.Sequential(nn.Linear(64, 32), PrivateDropout(), nn.Linear(32, 10))
    names = [*QUANTITIES, "normalized_sharpness", "normalized_sharpness_linf", "critical_lr"]
    record = geomwatch.measure(
        net, cross_entropy, batch, how=geomwatch.Measurement(quantities=names)
    )
    for name in names:
        assert (record[name].value, record[name].status) == (None, "withheld")
        assert "no function of the weights" in record[name].reason


def test_dropout_that_is_replayed_is_one_smooth_draw():
    batch = digits(128)
    net = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)).double()
    record = geomwatch.measure(
        net,
        cross_entropy,
        (batch[0].double(), batch[1]),
        how=geomwatch.Measurement(quantities=QUANTITIES),
    )
    assert record["roughness_residual"].value < 1e-3  # fresh masks make it about 1


def test_a_loss_below_its_own_rounding_is_withheld():
    layout = layout_of((4, 4))
    layout = Layout(layout.names, tuple(p.float() for p in layout.params))
    found = roughness(slices_of(lambda d: 1.0 + 1e-9 * float(d.sum()), layout))
    assert found.status == "withheld"
    assert "lost in the noise" in found.reason


def test_without_filters_there_is_nothing_to_move():
    slices = slices_of(lambda d: float(d @ d), layout_of((5,)))
    assert "no parameter has two or more dimensions" in roughness(slices).reason
    assert roughness_residual(slices).status == "withheld"


def test_an_overflowing_slice_is_withheld():
    layout = layout_of((5, 5))
    slices = slices_of(lambda d: 1.0 if d.abs().max() < 1e-6 else math.inf, layout)
    assert (roughness(slices).value, roughness(slices).status) == (None, "withheld")
    assert "not finite on the slices" in roughness(slices).reason
    slices = slices_of(lambda d: math.inf if d.any() else 1.0, layout)
    assert "not finite next to the weights" in roughness(slices).reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 1}, r"directions must be >= 2 .* got 1"),
        ({"points": 10}, r"points must be odd and >= 5, got 10"),
        ({"points": 3}, r"points must be odd and >= 5, got 3"),
    ],
)
def test_a_grid_that_gives_no_error_or_rest_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        slices_of(lambda d: float(d @ d), layout_of((5, 5)), **options)


def test_the_noise_floor_holds_the_rounding_of_a_float32_net():
    """Against the same losses in float64, trained until the loss is small beside its logits."""
    batch = digits()
    wide = batch[0].double(), batch[1]
    model = mlp(64, 64, 10)
    for steps in (0, 300):
        train(model, batch, steps=steps)
        double = copy.deepcopy(model).double()
        with (
            Objective(model, cross_entropy, [batch]) as narrow,
            Objective(double, cross_entropy, [wide]) as exact,
        ):
            v = filter_normalised(exact.layout, generator())
            alphas = np.linspace(-0.05, 0.05, 21)
            errors = [narrow.loss_at((a * v).float()) - exact.loss_at(a * v) for a in alphas]
            floor = read_out(narrow.loss_at, narrow.layout, rng=generator()).floor
            assert np.std(errors) < 2 * floor
            assert floor < 10 * np.std(errors)


def train(model: nn.Module, batch, *, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
