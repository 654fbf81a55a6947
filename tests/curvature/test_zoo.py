"""Hessian-vector products of the models that people train, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zoo import ZOO
from zoo_case import Case, difference, double_backward, exact_hvp, learned, trainable

from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.vectors.layout import Layout, generator

SEED = 5  # of the dropout masks

every_case = pytest.mark.parametrize("case", ZOO.values(), ids=ZOO)


def direction(case: Case) -> Tensor:
    """A random vector that float32 holds exactly, 0 where nothing is learned."""
    model, _ = case.build()
    v = Layout.of(model).normal(generator(1))
    return v.double() / 64 * learned(model)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@every_case
def test_an_hvp_is_that_of_the_twin_in_float64(case):
    v = direction(case)
    exact = exact_hvp(case, v, seed=SEED) * learned(case.build()[0])
    for build, dtype, tolerance in [
        (case.build, torch.float32, case.float32),
        (case.build_wide, torch.float64, case.float64),
    ]:
        model, batch = build()
        torch.manual_seed(SEED)
        with (
            case.wholly(dtype),
            Objective(model, case.loss_fn, [batch], how=Settings(hvp=case.backend)) as objective,
        ):
            found = objective.hvp(v.to(dtype))
            assert objective.provenance["backend"] == case.backend
        assert relative(found, exact) <= tolerance, dtype


@every_case
def test_the_twin_is_the_model_that_is_trained(case):
    v = direction(case)
    kept = learned(case.build()[0])
    exact, found = (f(case, v, seed=SEED) * kept for f in (exact_hvp, difference))
    assert relative(found, exact) < 1e-7


@every_case
def test_the_loss_of_a_probe_is_the_one_that_is_trained(case):
    model, batch = case.build()
    torch.manual_seed(SEED)
    loss = case.loss_fn(model, batch).item()
    model, batch = case.build()
    torch.manual_seed(SEED)
    with Objective(model, case.loss_fn, [batch]) as objective:
        assert objective.loss() == pytest.approx(loss, rel=1e-5)


def plain_hvp(case: Case, v: Tensor) -> Tensor:
    """By double backward of the model as it trains, without geomwatch."""
    model, batch = case.build()
    torch.manual_seed(SEED)
    return double_backward(case.loss_fn(model, batch), trainable(model), v)


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.obstacle])
def test_without_remedy_there_is_no_double_backward(name):
    case = ZOO[name]
    with pytest.raises(RuntimeError, match=case.obstacle):
        plain_hvp(case, direction(case))


@pytest.mark.parametrize("name", [name for name, case in ZOO.items() if case.silent])
def test_without_remedy_double_backward_is_wrong_without_a_word(name):
    case = ZOO[name]
    v = direction(case)
    exact = exact_hvp(case, v, seed=SEED)
    assert relative(plain_hvp(case, v), exact) > 0.02
