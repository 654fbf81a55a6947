"""What holds for every loss: properties of the operator and of its spectrum, on random ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from architectures import architectures
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import Quadratic, quadratic_loss
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.vectors.layout import Layout

ONE = torch.ones(1, dtype=torch.float64)
RITZ = (
    1e-7  # Lanczos stops at residuals of 1e-4, relative: their squares are what values are off by
)

few = settings(max_examples=15, deadline=None, derandomize=True)
many = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
coefficients = st.floats(-10, 10, allow_nan=False, width=32)


def dense(objective: Objective) -> Tensor:
    unit = torch.eye(objective.layout.dim, dtype=torch.float64)
    return torch.stack([objective.hvp(e) for e in unit], dim=1)


def close(found: Tensor, exact: Tensor, tolerance: float = 1e-9) -> bool:
    """To within `tolerance` of the larger one; a Hessian may be zero."""
    size = max(float(found.norm()), float(exact.norm()), 1e-6)
    return float((found - exact).norm()) <= tolerance * size


# --- the operator ----------------------------------------------------------------------------


@many
@given(net=architectures, a=coefficients, b=coefficients)
def test_the_operator_of_any_architecture_is_linear_and_symmetric(net, a, b):
    with Objective(net.build(), net.loss_fn, [net.batch()]) as objective:
        u, v = torch.randn(2, objective.layout.dim, dtype=torch.float64)
        hu, hv = objective.hvp(u), objective.hvp(v)
        assert close(objective.hvp(a * u + b * v), a * hu + b * hv)
        size = max(float(hu.norm() * v.norm()), float(hv.norm() * u.norm()), 1e-6)
        assert abs(float(u @ hv - v @ hu)) <= 1e-9 * size


@few
@given(net=architectures)
def test_the_operator_of_any_architecture_is_its_dense_hessian(net):
    model, (inputs, labels) = net.build(), net.batch()
    layout = Layout.of(model)
    state = torch.get_rng_state()

    def loss(flat: Tensor) -> Tensor:
        torch.set_rng_state(state)  # of the dropout masks
        weights = dict(zip(layout.names, layout.unflatten(flat), strict=True))
        outputs = torch.func.functional_call(model, weights, (inputs,))
        return net.loss_fn(lambda _: outputs, (inputs, labels))

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = torch.autograd.functional.hessian(loss, layout.values())
    torch.set_rng_state(state)
    with Objective(model, net.loss_fn, [(inputs, labels)]) as objective:
        assert close(dense(objective), exact)


@few
@given(net=architectures, data=st.data())
def test_registering_layers_in_another_order_permutes_the_hessian(net, data):
    order = data.draw(st.permutations(range(net.depth)))
    vectors, products = [], []
    for model in (net.build(), net.build(order)):
        torch.manual_seed(1)
        with Objective(model, net.loss_fn, [net.batch()]) as objective:
            layout = objective.layout
            v = by_name(layout, seed=net.seed)
            products.append(pieces(layout, objective.hvp(v)))
            vectors.append(pieces(layout, v))
    assert all(torch.equal(vectors[0][name], vectors[1][name]) for name in vectors[0])
    joined = [torch.cat([p[name] for name in vectors[0]]) for p in products]
    assert close(joined[0], joined[1])


def pieces(layout: Layout, v: Tensor) -> dict[str, Tensor]:
    parts = [piece.reshape(-1) for piece in layout.unflatten(v)]
    return dict(zip(layout.names, parts, strict=True))


def by_name(layout: Layout, seed: int) -> Tensor:
    """A random vector whose entries for a parameter are the same in any order of them."""
    drawn: dict[str, Tensor] = {}
    rng = torch.Generator().manual_seed(seed)
    shapes = dict(zip(layout.names, layout.params, strict=True))
    for name in sorted(shapes):
        drawn[name] = torch.randn(shapes[name].shape, generator=rng, dtype=torch.float64)
    return layout.flatten([drawn[name] for name in layout.names])


# --- the spectrum ----------------------------------------------------------------------------

SPECTRUM = ["loss", "grad_norm", "lambda_max", "lambda_2", "lambda_min", "batch_sharpness"]


def spectrum(model: nn.Module, loss_fn: Any, batch: Any, **options: Any) -> list[float]:
    """With as many HVPs as there are parameters, so that nothing depends on the start."""
    torch.manual_seed(1)  # of the dropout masks
    dim = Layout.of(model).dim
    record = geomwatch.measure(
        model,
        loss_fn,
        batch,
        how=geomwatch.Measurement(quantities=SPECTRUM, hvp="double_backward"),
        max_hvps=dim + 2,
    )
    return [record[name].value for name in SPECTRUM]


def same(found: list[float], exact: list[float], tolerance: float = 1e-6) -> bool:
    """Eigenvalues to within the size of the largest; where the gradient is zero so is the rest."""
    size = max(abs(x) for x in exact)
    return all(abs(a - b) <= tolerance * size for a, b in zip(found, exact, strict=True))


@few
@given(net=architectures, data=st.data())
def test_the_spectrum_does_not_depend_on_the_order_of_the_parameters(net, data):
    order = data.draw(st.permutations(range(net.depth)))
    one, other = (spectrum(m, net.loss_fn, net.batch()) for m in (net.build(), net.build(order)))
    assert same(one, other)


@few
@given(net=architectures, data=st.data())
def test_the_spectrum_does_not_depend_on_the_order_of_the_items(net, data):
    assume("dropout" not in net.kinds)  # whose masks are drawn item by item
    inputs, labels = net.batch()
    order = data.draw(st.permutations(range(len(labels))))
    batches = (inputs, labels), (inputs[order], labels[order])
    one, other = (spectrum(net.build(), net.loss_fn, batch) for batch in batches)
    assert same(one, other)


@few
@given(net=architectures, factor=st.floats(1e-3, 1e3))
def test_the_spectrum_grows_with_the_loss(net, factor):
    def scaled(model: nn.Module, batch: Any) -> Tensor:
        return factor * net.loss_fn(model, batch)

    one, other = (spectrum(net.build(), f, net.batch()) for f in (net.loss_fn, scaled))
    assert same(other, [factor * value for value in one])


# --- closed forms ----------------------------------------------------------------------------


class Blocks(nn.Module):
    """L(w) = w'Aw / 2 with w in several parameters, registered in any order."""

    def __init__(self, matrix: Tensor, start: Tensor, sizes: list[int], order: list[int]) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        blocks = [nn.Parameter(block.clone()) for block in start.split(sizes)]
        for index in order:
            self.register_parameter(f"w{index}", blocks[index])
        self.count = len(sizes)

    def forward(self, scale: Tensor) -> Tensor:
        w = torch.cat([getattr(self, f"w{index}") for index in range(self.count)])
        return scale.mean() * 0.5 * w @ self.matrix @ w


@st.composite
def orders(draw: Any) -> tuple[list[int], list[int]]:
    """Sizes of some parameters, and an order of them."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    return sizes, draw(st.permutations(range(len(sizes))))


@few
@given(blocks=orders(), data=st.data())
def test_trace_and_effective_rank_of_a_diagonal_hessian_are_exact_in_any_order(blocks, data):
    sizes, order = blocks
    count = sum(sizes)
    diagonal = torch.tensor(
        data.draw(st.lists(st.floats(0.01, 100), min_size=count, max_size=count)),
        dtype=torch.float64,
    )
    model = Blocks(torch.diag(diagonal), torch.ones(count, dtype=torch.float64), sizes, order)
    names = ["trace", "trace_per_param", "trace_squared", "effective_rank", "lambda_max"]
    record = geomwatch.measure(
        model, quadratic_loss, ONE, how=geomwatch.Measurement(quantities=names), samples=4
    )
    trace, squares = float(diagonal.sum()), float(diagonal.square().sum())
    exact = [trace, trace / count, squares, trace**2 / squares, float(diagonal.max())]
    for name, value in zip(names, exact, strict=True):
        assert record[name].value == pytest.approx(value, rel=RITZ), name


def quadratic(dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """A random symmetric matrix, positive or not, and a point."""
    rng = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    definite = matrix @ matrix.T if seed % 2 else matrix + matrix.T
    return definite, torch.randn(dim, generator=rng, dtype=torch.float64)


@few
@given(blocks=orders(), seed=seeds)
def test_the_spectrum_of_a_quadratic_is_its_matrixs_in_any_order(blocks, seed):
    sizes, order = blocks
    matrix, start = quadratic(sum(sizes), seed)
    values = torch.linalg.eigvalsh(matrix).flip(0).tolist()
    gradient = matrix @ start
    sharpness = float(gradient @ matrix @ gradient / (gradient @ gradient))
    found = spectrum(Blocks(matrix, start, sizes, order), quadratic_loss, ONE)
    loss = float(0.5 * start @ gradient)
    ends = [values[0], values[1], values[-1]]
    assert found == pytest.approx([loss, float(gradient.norm()), *ends, sharpness], rel=RITZ)


@few
@given(dim=st.integers(2, 12), seed=seeds, samples=st.integers(2, 20))
def test_the_trace_of_a_quadratic_is_within_its_known_variance(dim, seed, samples):
    matrix, start = quadratic(dim, seed)
    record = geomwatch.measure(
        Quadratic(matrix, start),
        quadratic_loss,
        ONE,
        how=geomwatch.Measurement(quantities=["trace"]),
        samples=samples,
    )
    off_diagonal = matrix - torch.diag(matrix.diagonal())
    stderr = math.sqrt(2 * float(off_diagonal.square().sum()) / samples)
    assert abs(record["trace"].value - float(matrix.trace())) <= 5 * stderr + 1e-9


@few
@given(
    dim=st.integers(1, 8),
    seed=seeds.map(lambda seed: 2 * seed + 1),  # a positive matrix
    lr=st.floats(1e-4, 10),
    momentum=st.floats(0, 0.95),
)
def test_margin_and_critical_rate_of_a_quadratic_have_closed_forms(dim, seed, lr, momentum):
    matrix, start = quadratic(dim, seed)
    model = Quadratic(matrix, start)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    record = geomwatch.measure(
        model,
        quadratic_loss,
        ONE,
        how=geomwatch.Measurement(quantities=["stability_margin", "critical_lr"]),
        optimizer=optimizer,
        max_hvps=dim + 2,
    )
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    exact = lr * largest / (2 * (1 + momentum))
    assert record["stability_margin"].value == pytest.approx(exact, rel=RITZ)
    gradient = matrix @ start
    back = 2 * float(gradient @ gradient / (gradient @ matrix @ gradient))
    critical = record["critical_lr"]
    assert abs(critical.value - back) <= critical.error * (1 + 1e-6)
