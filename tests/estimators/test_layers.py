"""Curvature by layer against the diagonal blocks of dense Hessians."""

from __future__ import annotations

import pytest
import torch
from problems import cross_entropy, dense_hessian, digits, mlp
from torch import nn

from geomwatch.curvature.objective import Objective
from geomwatch.estimators.hutchinson import hutchinson, mean_with_stderr
from geomwatch.estimators.layers import layer_lambda_max, layer_trace
from geomwatch.vectors.layout import Layout


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=[nn.ReLU, nn.Tanh])
def net(request):
    """A net in training, its batch and its exact Hessian."""
    torch.manual_seed(2)
    model = mlp(64, 10, 8, 10, activation=request.param).double()
    batch = digits(200)
    batch = batch[0].double(), batch[1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    return model, batch, dense_hessian(model, batch)


def blocks(model: nn.Module, hessian: torch.Tensor) -> dict[str, torch.Tensor]:
    """The diagonal block of each layer: weight and bias follow one another."""
    found, start = {}, 0
    for name, module in model.named_children():
        size = sum(p.numel() for p in module.parameters())
        if size:
            found[name] = hessian[start : start + size, start : start + size]
            start += size
    return found


def test_the_largest_eigenvalue_of_each_block_is_found(net):
    model, batch, hessian = net
    with Objective(model, cross_entropy, [batch]) as objective:
        found = layer_lambda_max(
            objective.hvp, objective.layout, rng=generator(), max_hvps=40, tol=1e-8
        )
        assert objective.hvps == sum(e.hvps for e in found.values()) <= 3 * 40
    exact = {n: float(torch.linalg.eigvalsh(b)[-1]) for n, b in blocks(model, hessian).items()}
    assert list(found) == list(exact) == ["0", "2", "4"]
    for name, value in exact.items():
        assert found[name].value == pytest.approx(value, rel=1e-5)
        assert found[name].error_kind == "residual"
    # no block is stiffer than the whole
    assert max(exact.values()) <= float(torch.linalg.eigvalsh(hessian)[-1])


def test_few_hvps_give_a_lower_bound_with_a_residual(net):
    model, batch, hessian = net
    with Objective(model, cross_entropy, [batch]) as objective:
        found = layer_lambda_max(objective.hvp, objective.layout, rng=generator(), max_hvps=6)
    for name, block in blocks(model, hessian).items():
        exact = torch.linalg.eigvalsh(block)
        assert found[name].hvps <= 6
        assert found[name].value <= float(exact[-1]) * (1 + 1e-9)
        assert float((exact - found[name].value).abs().min()) <= found[name].error + 1e-9


def test_traces_of_layers_are_unbiased_and_add_up_to_the_total(net):
    model, batch, hessian = net
    with Objective(model, cross_entropy, [batch]) as objective:
        samples = hutchinson(objective.hvp, objective.layout, samples=64, rng=generator())
        spent = objective.hvps
        found = layer_trace(samples, objective.layout)
        assert objective.hvps == spent == 64
    for name, block in blocks(model, hessian).items():
        assert found[name].value == pytest.approx(float(block.trace()), abs=4 * found[name].error)
        assert found[name].error < 0.5 * abs(found[name].value)
        assert (found[name].error_kind, found[name].hvps) == ("stderr", 64)
    total = mean_with_stderr(samples.quadratic, hvps=64)
    assert sum(e.value for e in found.values()) == pytest.approx(total.value, rel=1e-9)


def test_a_layers_error_is_that_of_its_own_samples():
    """Blocks without coupling: a diagonal one has no variance, whatever the other has."""
    layout = Layout(
        ("calm.weight", "wild.weight", "wild.bias"),
        tuple(torch.zeros(n, dtype=torch.float64) for n in (5, 6, 2)),
    )
    wild = torch.randn(8, 8, dtype=torch.float64)
    matrix = torch.block_diag(torch.diag(torch.arange(1.0, 6.0).double()), wild @ wild.T)
    samples = hutchinson(lambda v: matrix @ v, layout, samples=400, rng=generator())
    found = layer_trace(samples, layout)
    assert found["calm"].value == pytest.approx(15.0)
    assert found["calm"].error == pytest.approx(0.0, abs=1e-9)
    block = matrix[5:, 5:]
    variance = 2 * float((block - torch.diag(block.diagonal())).square().sum())
    assert found["wild"].error == pytest.approx((variance / 400) ** 0.5, rel=0.2)


def test_parameters_of_one_module_need_not_be_neighbours():
    names = ("a.weight", "b.weight", "a.bias", "scale")
    layout = Layout(names, tuple(torch.zeros(2, dtype=torch.float64) for _ in names))
    matrix = torch.randn(8, 8, dtype=torch.float64)
    matrix = matrix + matrix.T
    found = layer_lambda_max(lambda v: matrix @ v, layout, rng=generator())
    assert list(found) == ["a", "b", "scale"]
    for module, rows in {"a": [0, 1, 4, 5], "b": [2, 3], "scale": [6, 7]}.items():
        exact = torch.linalg.eigvalsh(matrix[rows][:, rows])[-1]
        assert found[module].value == pytest.approx(float(exact), abs=1e-9)
        assert found[module].hvps <= len(rows)  # no more than the block has dimensions


def test_one_sample_is_refused():
    layout = Layout(("w",), (torch.zeros(3),))
    samples = hutchinson(lambda v: v, layout, samples=1, rng=generator())
    with pytest.raises(ValueError, match=r"samples must be >= 2 .* got 1"):
        layer_trace(samples, layout)
