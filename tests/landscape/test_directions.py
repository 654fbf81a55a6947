"""Directions against the vectors they should be, and the trajectory of a run on a plane."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from problems import Quadratic, cross_entropy, dense_hessian, digits, mlp, quadratic_loss, wishart
from torch import nn

from geomwatch import Measurement, landscape
from geomwatch.errors import UsageError, UsageTypeError
from geomwatch.landscape.direction import Direction, as_direction, layout_of


def train(model: nn.Module, *, steps: int = 40, keep: int = 5) -> list[dict]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batch = digits(256)
    states = [copy.deepcopy(model.state_dict())]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
        if step % keep == 0:
            states.append(copy.deepcopy(model.state_dict()))
    return states


def pieces(model: nn.Module, v: Direction) -> list[torch.Tensor]:
    return layout_of(model, v.names).unflatten(v.vector)


def test_a_direction_is_scaled_by_filters_by_layers_or_to_unit_length():
    model = mlp(64, 16, 10)
    for piece, p in zip(
        pieces(model, landscape.random_direction(model)), model.parameters(), strict=True
    ):
        wanted = p.norm(dim=1) if p.dim() > 1 else torch.zeros(len(p))
        found = piece.norm(dim=1) if p.dim() > 1 else piece
        assert torch.allclose(found, wanted.detach())
    layered = landscape.random_direction(model, scale="layer")
    for piece, p in zip(pieces(model, layered), model.parameters(), strict=True):
        assert float(piece.norm()) == pytest.approx(float(p.detach().norm()), rel=1e-5)
    unit = landscape.random_direction(model, scale="unit", seed=1)
    assert float(unit.vector.norm()) == pytest.approx(1)
    again, other = (landscape.random_direction(model, scale="unit", seed=s) for s in (1, 2))
    assert torch.equal(unit.vector, again.vector)
    assert abs(float(unit.vector @ other.vector)) < 0.2


def test_a_direction_may_be_in_some_parameters_only():
    model = mlp(64, 16, 10)
    v = landscape.random_direction(model, params="2.*")
    assert v.names == ("2.weight", "2.bias")
    before = {k: t.clone() for k, t in model.state_dict().items()}
    seen = []

    def watching(m, batch):
        seen.append(torch.equal(m[0].weight, before["0.weight"]))
        return cross_entropy(m, batch)

    found = landscape.slice_1d(model, watching, [digits(32)], v, alphas=[0, 1])
    assert found.losses[0] != found.losses[1]
    assert all(seen)


def test_the_update_direction_leads_from_one_state_to_the_other():
    model = mlp(64, 16, 10)
    first, *_, last = train(model)
    model.load_state_dict(first)
    v = landscape.update_direction(model, first, last)
    found = landscape.slice_1d(model, cross_entropy, [digits(256)], v, alphas=[0, 1])
    model.load_state_dict(last)
    end = landscape.slice_1d(model, cross_entropy, [digits(256)], v, alphas=[-1, 0])
    assert found.losses[1] == pytest.approx(end.loss, rel=1e-5)
    assert end.losses[0] == pytest.approx(found.loss, rel=1e-5)
    with pytest.raises(UsageError, match="finite and not zero, got norm 0"):
        landscape.update_direction(model, first, copy.deepcopy(first))


def test_hessian_directions_are_eigenvectors_and_say_how_far_from_it():
    torch.manual_seed(3)
    model = mlp(64, 8, 10)
    train(model, steps=30)
    batch = digits(256)
    exact, vectors = torch.linalg.eigh(dense_hessian(model, batch))
    found = landscape.hessian_directions(model, cross_entropy, [batch], k=3)
    for i, v in enumerate(found):
        facts = v.facts
        assert facts["converged"]
        assert facts["residual"] <= 1e-3 * facts["eigenvalue"]
        assert facts["eigenvalue"] == pytest.approx(float(exact[-1 - i]), rel=1e-4)
        assert abs(float(v.vector.double() @ vectors[:, -1 - i])) == pytest.approx(1, abs=1e-3)
        assert float(v.vector[v.vector.abs().argmax()]) > 0
        assert v.label == f"eigenvector {i + 1}, λ = {facts['eigenvalue']:.3g}"
    (rough,) = landscape.hessian_directions(model, cross_entropy, [batch], k=1, max_hvps=3)
    assert not rough.facts["converged"]


def test_directions_are_measured_as_the_measurement_says():
    torch.manual_seed(3)
    model, batch = mlp(64, 8, 10), digits(64)
    whole = landscape.gradient_direction(model, cross_entropy, [batch])
    cut = landscape.gradient_direction(model, cross_entropy, [batch], Measurement(micro_batch=20))
    assert torch.allclose(cut.vector, whole.vector, atol=1e-6)
    part = landscape.gradient_direction(model, cross_entropy, [batch], Measurement(params="2.*"))
    assert part.names == ("2.weight", "2.bias")
    how = Measurement(operator="ggn", micro_batch=20, mode="eval")
    (top, _) = landscape.hessian_directions(model, cross_entropy, [batch], how)
    (other, _) = landscape.hessian_directions(model, cross_entropy, [batch])
    facts = top.facts
    assert (facts["operator"], facts["mode"], facts["seed"]) == ("ggn", "eval", 0)
    assert facts["eigenvalue"] != pytest.approx(other.facts["eigenvalue"], rel=1e-3)


def test_a_direction_of_a_loss_that_changes_with_the_call_is_marked():
    model = mlp(64, 8, 10)
    calls = itertools.count()

    def drifting(model, batch):
        return cross_entropy(model, batch) * (1 + 0.01 * next(calls))

    made = [
        landscape.gradient_direction(model, drifting, [digits(16)]),
        *landscape.hessian_directions(model, drifting, [digits(16)], max_hvps=4),
    ]
    for direction in made:
        assert not direction.facts["deterministic"]
        assert direction.facts["repeat_difference"] > 0
    assert landscape.gradient_direction(model, cross_entropy, [digits(16)]).facts["deterministic"]


def test_the_curvature_of_a_slice_along_an_eigenvector_is_its_eigenvalue():
    model = Quadratic(wishart(12, seed=2))
    ones = [torch.ones(2, dtype=torch.float64)]
    directions = landscape.hessian_directions(model, quadratic_loss, ones, k=2)
    for v in directions:
        fit = landscape.polynomial_fit(landscape.slice_1d(model, quadratic_loss, ones, v))
        assert 2 * fit.coefficients[2] == pytest.approx(v.facts["eigenvalue"], rel=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.ones(3), r"shape \(1210,\), .* got \(3,\)\. Is it of this model"),
        (torch.zeros(1210), "finite and not zero, got norm 0"),
        (torch.full((1210,), math.nan), "finite and not zero, got norm nan"),
        (
            Direction(torch.ones(2), ("other",), "v", {}),
            "name trainable parameters of the model, got other",
        ),
    ],
)
def test_a_direction_that_does_not_fit_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        as_direction(mlp(64, 16, 10), given)


def test_other_things_are_no_directions():
    model = mlp(64, 16, 10)
    v = landscape.random_direction(model)
    with pytest.raises(UsageTypeError, match=r"got list\. random_direction\(model\) makes one"):
        as_direction(model, [1.0])
    with pytest.raises(
        UsageError, match=r'scale must be one of filter, layer, unit, got "big"|big'
    ):
        landscape.random_direction(model, scale="big")
    with pytest.raises(UsageError, match=r"span a plane, got two that are parallel"):
        landscape.plane(model, cross_entropy, [digits(8)], [v, -2 * v.vector])
    with pytest.raises(UsageError, match=r"directions must be two, to span a plane, got 1"):
        landscape.plane(model, cross_entropy, [digits(8)], [v])
    part = landscape.random_direction(model, params="0.*")
    with pytest.raises(UsageError, match="in the same parameters, got two different sets"):
        landscape.plane(model, cross_entropy, [digits(8)], [v, part])
    with pytest.raises(UsageError, match="needs weights that are not all zero in two or more dim"):
        landscape.random_direction(Quadratic(torch.eye(3)))


def test_a_direction_in_parameters_that_are_frozen_now_is_refused():
    model = mlp(64, 16, 10)
    v = landscape.random_direction(model)
    model[2].requires_grad_(False)
    with pytest.raises(UsageError, match=r"trainable parameters of the model, got 2\.weight"):
        landscape.slice_1d(model, cross_entropy, [digits(8)], v)


# --- trajectories ------------------------------------------------------------------------------


def as_matrix(model: nn.Module, states: list[dict]) -> np.ndarray:
    names = [n for n, _ in model.named_parameters()]
    rows = [torch.cat([state[n].reshape(-1) for n in names]) for state in states]
    return torch.stack(rows).double().numpy()


def test_pca_directions_are_those_of_a_singular_value_decomposition():
    model = mlp(64, 8, 10)
    states = train(model)
    differences = as_matrix(model, states) - as_matrix(model, [model.state_dict()])
    _, values, rows = np.linalg.svd(differences, full_matrices=False)
    first, second = landscape.pca_directions(model, states)
    for v, row, value in zip((first, second), rows, values, strict=False):
        assert abs(float(v.vector.double() @ torch.from_numpy(row))) == pytest.approx(1, abs=1e-5)
        assert v.facts["explained"] == pytest.approx(value**2 / (values**2).sum(), rel=1e-6)


def test_a_trajectory_lies_where_its_states_are():
    model = mlp(64, 8, 10)
    states = train(model)
    directions = landscape.pca_directions(model, states)
    path = landscape.trajectory(model, states, directions)
    differences = as_matrix(model, states) - as_matrix(model, [model.state_dict()])
    plane = torch.stack([d.vector for d in directions]).double().numpy()
    assert path.coordinates == pytest.approx(differences @ plane.T, abs=1e-5)
    assert path.coordinates[-1] == pytest.approx([0, 0], abs=1e-9)
    assert path.coordinates[0, 0] > 0
    assert path.distance == pytest.approx(np.linalg.norm(differences, axis=1), rel=1e-6)
    rest = differences - path.coordinates @ plane
    assert path.off_plane == pytest.approx(np.linalg.norm(rest, axis=1), abs=1e-4)
    assert path.explained == pytest.approx([d.facts["explained"] for d in directions], rel=1e-4)


def test_a_trajectory_is_projected_orthogonally_on_an_oblique_plane():
    model = mlp(64, 8, 10)
    states = train(model, steps=10)
    first, second = landscape.pca_directions(model, states)
    oblique = Direction(first.vector + second.vector, first.names, "sum", {})
    straight = landscape.trajectory(model, states, (first, second))
    found = landscape.trajectory(model, states, (first, oblique))
    a, b = found.coordinates.T
    assert np.stack([a + b, b], axis=1) == pytest.approx(straight.coordinates, abs=1e-5)
    assert sum(found.explained) == pytest.approx(sum(straight.explained), rel=1e-6)


def test_a_grid_holds_the_trajectory_and_its_centre():
    model = mlp(64, 8, 10)
    states = train(model)
    path = landscape.trajectory(model, states, landscape.pca_directions(model, states))
    alphas, betas = landscape.grid_around(path, points=9)
    for axis, values in ((alphas, path.coordinates[:, 0]), (betas, path.coordinates[:, 1])):
        assert len(axis) == 9
        assert axis[0] < min(values.min(), 0)
        assert axis[-1] > max(values.max(), 0)


def test_states_that_span_no_plane_are_refused():
    model = mlp(64, 8, 10)
    first, *_, last = train(model)
    with pytest.raises(UsageError, match="at least 2 state_dicts, got 1"):
        landscape.pca_directions(model, [first])
    with pytest.raises(UsageError, match="got 2 states on one line through them"):
        landscape.pca_directions(model, [first, last])
    with pytest.raises(UsageError, match=r"states\[1\] must be a state of this Sequential"):
        landscape.pca_directions(model, [first, {}])
    with pytest.raises(UsageError, match="a list of at least 2 state_dicts, got OrderedDict"):
        landscape.pca_directions(model, first)
