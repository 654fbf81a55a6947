"""Normalized sharpness against closed forms, and its invariances."""

from __future__ import annotations

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.estimators.noise_floor import read_out
from geomwatch.estimators.normalized_sharpness import (
    normalized_sharpness,
    normalized_sharpness_linf,
)
from geomwatch.records import Estimate

BATCH = torch.ones(1, dtype=torch.float64)
EITHER = pytest.mark.parametrize("measure", [normalized_sharpness, normalized_sharpness_linf])
EPS = 1e-2


class Slope(nn.Module):
    """L = 5 + sum_l <c_l, w_l> over two matrices and a bias."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"first": (4, 3), "second": (2, 5), "bias": (4, 1)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))
            self.register_buffer(f"c_{name}", torch.randn(shape, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return 5 + sum((c * self.get_parameter(n[2:])).sum() for n, c in self.named_buffers())


class Bowl(nn.Module):
    """L = 1 + (w - centre)' A (w - centre) / 2 for a matrix w of six entries."""

    def __init__(self, matrix: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -1.0]]).double())
        self.register_buffer("matrix", matrix)
        self.register_buffer("centre", centre)

    def forward(self, _: Tensor) -> Tensor:
        d = (self.w - self.centre).reshape(-1)
        return 1 + d @ self.matrix @ d / 2


def rise(
    measure, model: nn.Module, batch=BATCH, loss_fn=lambda model, batch: model(batch), **options
):
    rng = torch.Generator().manual_seed(0)
    with Objective(model, loss_fn, [batch]) as objective:
        readout = read_out(objective.loss_at, objective.layout, rng=rng)
        found: Estimate = measure(objective, readout, rng=rng, **options)
    return found


def stiff_matrix() -> Tensor:
    factor = torch.randn(6, 6, dtype=torch.float64)
    return factor @ torch.diag(torch.tensor([9.0, 3.0, 1.0, 1.0, 0.5, 0.1]).double()) @ factor.T


def test_a_slope_has_its_closed_form_in_both_balls():
    model = Slope()
    a = [(model.first * model.c_first).detach(), (model.second * model.c_second).detach()]
    found = rise(normalized_sharpness, model)
    # the matrix named bias stays where it is
    assert found.value == pytest.approx(EPS * sum(float(x.norm()) for x in a), rel=1e-9)
    assert (found.error, found.error_kind, found.hvps) == (None, "none", 0)
    assert "lower bound" in found.reason
    assert "3 ascent steps, eps 0.01" in found.reason
    found = rise(normalized_sharpness_linf, model)
    assert found.value == pytest.approx(EPS * sum(float(x.abs().sum()) for x in a), rel=1e-9)


def test_at_the_bottom_of_a_bowl_it_is_the_top_eigenvalue_in_relative_coordinates():
    model = Bowl(stiff_matrix(), torch.zeros(2, 3).double())
    model.centre.copy_(model.w.detach())  # the gradient is zero: only the random start is there
    w = model.w.detach().reshape(-1).abs()
    exact = EPS**2 / 2 * float(torch.linalg.eigvalsh(w[:, None] * model.matrix * w).max())
    assert rise(normalized_sharpness, model, steps=50).value == pytest.approx(exact, rel=1e-6)
    few = rise(normalized_sharpness, model)
    assert 0.7 * exact < few.value <= exact * (1 + 1e-9)


def test_in_the_cube_it_is_the_best_corner():
    model = Bowl(stiff_matrix(), torch.full((2, 3), 0.9).double())
    w = model.w.detach().reshape(-1)
    corners = torch.cartesian_prod(*[torch.tensor([-EPS, EPS]).double()] * 6) * w
    away = w - model.centre.reshape(-1)
    exact = float(
        (corners @ model.matrix @ away + ((corners @ model.matrix) * corners).sum(1) / 2).max()
    )
    found = rise(normalized_sharpness_linf, model)
    assert found.value == pytest.approx(exact, rel=1e-6)


def test_on_the_sphere_it_is_the_best_of_a_dense_search():
    model = Bowl(stiff_matrix(), torch.full((2, 3), 0.99).double())
    model.centre.copy_(model.w.detach() * 0.999)  # slope and curvature matter alike
    w = model.w.detach().reshape(-1)
    u = torch.randn(400_000, 6, dtype=torch.float64)
    d = EPS * w.abs() * u / u.norm(dim=1, keepdim=True)
    slope = model.matrix @ (w - model.centre.reshape(-1))
    best = float((d @ slope + ((d @ model.matrix) * d).sum(1) / 2).max())
    found = rise(normalized_sharpness, model, steps=30)
    assert best * (1 - 1e-9) <= found.value <= best * 1.02


def test_a_peak_is_negative_on_the_sphere_and_withheld_in_the_cube():
    model = Bowl(-stiff_matrix(), torch.zeros(2, 3).double())
    model.centre.copy_(model.w.detach())
    assert rise(normalized_sharpness, model).value < 0
    found = rise(normalized_sharpness_linf, model)  # u = 0 belongs to the cube
    assert (found.value, found.status) == (None, "withheld")


class Walls(nn.Module):
    """L = 1 + d1 / 1000, and what `wall` adds, over a 1 x 2 matrix at (1, 1)."""

    def __init__(self, wall) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, 2, dtype=torch.float64))
        self.wall = wall

    def forward(self, _: Tensor) -> Tensor:
        d = self.w[0] - 1
        return 1 + d[0] / 1000 + self.wall(d)


@EITHER
def test_a_wall_behind_the_gradient_is_seen(measure):
    found = rise(measure, Walls(lambda d: 1e3 * torch.relu(-d[0] - 0.009)))
    assert found.value == pytest.approx(1e3 * 0.001 - 1e-5, rel=1e-6)


@EITHER
def test_a_wall_beside_the_gradient_is_seen(measure):
    found = rise(measure, Walls(lambda d: 1e3 * d[1].square()))
    assert found.value == pytest.approx(1e3 * EPS**2, rel=1e-3)


@EITHER
def test_rescaling_the_layers_of_a_relu_net_changes_nothing(measure):
    batch = digits(128)
    batch = batch[0].double(), batch[1]
    values = []
    for c in (1.0, 10.0, 0.05):
        torch.manual_seed(0)
        model = mlp(64, 32, 10).double()
        with torch.no_grad():
            model[0].weight.mul_(c)
            model[0].bias.mul_(c)
            model[2].weight.div_(c)
        values.append(rise(measure, model, batch, cross_entropy).value)
    assert values[1:] == pytest.approx(values[:1] * 2, rel=1e-3)
    assert values[0] > 1e-5


@EITHER
def test_more_steps_never_find_less(measure):
    batch = digits(128)
    model = mlp(64, 32, 10)
    found = [rise(measure, model, batch, cross_entropy, steps=k).value for k in (1, 3, 20)]
    assert found[0] <= found[1] <= found[2]


def test_tensors_that_are_zero_are_named_because_they_never_move():
    model = mlp(64, 16, 10)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    batch = digits(64)
    # through a zero layer nothing that the first one does can be seen
    assert rise(normalized_sharpness, model, batch, cross_entropy).status == "withheld"
    nn.init.normal_(model[2].weight)
    nn.init.zeros_(model[0].weight)
    nn.init.ones_(model[0].bias)
    found = rise(normalized_sharpness, model, batch, cross_entropy)
    assert found.reason.endswith("all zero, so they never move: 0.weight")


def test_a_model_of_vectors_cannot_move():
    model = nn.LayerNorm(4)
    found = rise(normalized_sharpness, model, torch.randn(3, 4), lambda m, b: m(b).square().sum())
    assert "no weight can move" in found.reason


def test_a_rise_below_the_noise_floor_is_withheld():
    model, batch = mlp(64, 16, 10), digits(64)

    def offset(model, batch):
        return cross_entropy(model, batch) + 1e6

    found = rise(normalized_sharpness, model, batch, offset)
    assert (found.value, found.status) == (None, "withheld")
    assert "below the noise floor" in found.reason


def test_a_loss_that_overflows_in_the_ball_is_withheld():
    model = Bowl(stiff_matrix(), torch.zeros(2, 3).double())
    edge = float(model.w.detach().norm()) * (1 + 1e-6)

    def overflows(model, _):
        size = model.w.norm()
        return torch.where(size < edge, size, size / 0)

    found = rise(normalized_sharpness, model, BATCH, overflows)
    assert (found.value, found.status) == (None, "withheld")
    assert "not finite" in found.reason


@EITHER
@pytest.mark.parametrize("options", [{"eps": 0.0}, {"steps": 0}])
def test_a_ball_or_an_ascent_of_nothing_is_refused(measure, options):
    with pytest.raises(ValueError, match=r"eps and steps must be positive, got eps="):
        rise(measure, Slope(), **options)


def test_it_is_found_through_measure():
    record = geomwatch.measure(
        mlp(64, 32, 10),
        cross_entropy,
        digits(128),
        how=geomwatch.Measurement(quantities=["normalized_sharpness", "normalized_sharpness_linf"]),
    )
    # ||u||_2 = 1 in place of |u_i| <= 1: smaller by about the root of the number of weights
    assert 0 < 5 * record["normalized_sharpness"].value < record["normalized_sharpness_linf"].value
    assert record.provenance["hvps"] == 0
