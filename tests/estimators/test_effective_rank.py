"""Effective rank against spectra that we chose, and its jackknife error against repetition."""

from __future__ import annotations

import statistics

import pytest
import torch
from problems import Quadratic, cross_entropy, dense_hessian, digits, mlp, quadratic_loss, wishart

import geomwatch
from geomwatch.estimators.effective_rank import effective_rank
from geomwatch.estimators.hutchinson import Samples, hutchinson, student_t
from geomwatch.vectors.layout import Layout


def samples_of(matrix: torch.Tensor, count: int, seed: int = 0) -> Samples:
    layout = Layout(("w",), (torch.zeros(len(matrix), dtype=matrix.dtype),))
    rng = torch.Generator().manual_seed(seed)
    return hutchinson(lambda v: matrix @ v, layout, samples=count, rng=rng)


def exact(matrix: torch.Tensor) -> float:
    return float(matrix.trace() ** 2 / (matrix @ matrix).trace())


@pytest.mark.parametrize(
    ("diagonal", "rank"),
    [([1.0] * 30, 30.0), ([0.0, 7.0, 0.0], 1.0), (list(range(1, 11)), 55**2 / 385)],
)
def test_it_is_exact_for_a_diagonal_hessian(diagonal, rank):
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    found = effective_rank(samples_of(matrix, 4), smallest=0.0, largest=1.0)
    assert found.value == pytest.approx(rank, rel=1e-12)
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert (found.error_kind, found.hvps) == ("stderr", 4)


def test_a_dense_hessian_of_rank_one_has_rank_one():
    v = torch.randn(200, dtype=torch.float64)
    found = effective_rank(samples_of(torch.outer(v, v), 200), smallest=0.0, largest=1.0)
    assert found.value == pytest.approx(1.0, abs=4 * found.error)
    assert found.error < 0.2


def test_its_bias_is_small_even_for_rank_one():
    v = torch.randn(50, dtype=torch.float64)
    samples = [samples_of(torch.outer(v, v), 16, seed) for seed in range(600)]
    found = [effective_rank(s, smallest=0.0, largest=1.0).value for s in samples]
    values = [value for value in found if value is not None]
    assert len(values) > 0.94 * 600  # the others have no clearly positive trace
    assert statistics.fmean(values) == pytest.approx(1.0, abs=0.06)  # 0.88 without the jackknife


def test_bias_and_error_are_small_and_honest_over_repetitions():
    matrix = torch.diag(torch.cat([torch.tensor([50.0, 20.0, 10.0]), torch.rand(97)]).double())
    rotation = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0]
    matrix = rotation @ matrix @ rotation.T
    values, errors, covered = [], [], 0
    for seed in range(400):
        found = effective_rank(samples_of(matrix, 8, seed), smallest=0.0, largest=50.0)
        if found.value is None:  # a trace that is not clearly positive
            continue
        if found.value is None:  # the trace was not clearly positive, in one case of a hundred
            continue
        values.append(found.value)
        errors.append(found.error)
        covered += abs(found.value - exact(matrix)) <= student_t(7) * found.error
    assert len(values) > 0.97 * 400
    spread = statistics.stdev(values)
    # the plain ratio (mean q)^2 / mean ||Hz||^2 is off by 6 % here
    assert statistics.fmean(values) == pytest.approx(exact(matrix), rel=0.025)
    assert statistics.fmean(errors) == pytest.approx(spread, rel=0.25)
    assert len(values) >= 0.98 * 400
    assert covered >= 0.88 * len(values)


def test_an_indefinite_hessian_has_none():
    matrix = torch.diag(torch.tensor([10.0, 3.0, -1.1], dtype=torch.float64))
    found = effective_rank(samples_of(matrix, 4), smallest=-1.1, largest=10.0)
    assert (found.value, found.status) == (None, "withheld")
    assert "indefinite" in found.reason
    assert "Gauss-Newton" in found.reason
    assert effective_rank(samples_of(matrix, 4), smallest=-0.9, largest=10.0).value is not None


def test_a_trace_that_may_be_zero_gives_none():
    samples = Samples(quadratic=(5.0, -4.0, 3.0, 1.0), squared=(9.0, 9.0, 9.0, 9.0))
    found = effective_rank(samples, smallest=0.0, largest=1.0)
    assert found.status == "withheld"
    assert "not clearly positive" in found.reason


def test_two_samples_give_none():
    found = effective_rank(samples_of(torch.eye(5), 2), smallest=1.0, largest=1.0)
    assert found.status == "withheld"
    assert "three trace samples" in found.reason


@pytest.mark.parametrize("freedom", [1, 2, 5, 10, 11, 20, 60, 1000])
def test_students_quantile_is_scipys(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=3e-3)


def test_a_trained_net_is_within_its_interval():
    model, batch = mlp(64, 12, 10), digits(256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    truth = exact(dense_hessian(model, batch))
    record = geomwatch.measure(
        model,
        cross_entropy,
        batch,
        how=geomwatch.Measurement(quantities=["effective_rank", "trace"]),
        samples=30,
    )
    found = record["effective_rank"]
    assert found.value == pytest.approx(truth, abs=4 * found.error)
    assert found.error < 0.2 * truth
    assert record.provenance["hvps"] <= 20 + 30  # the samples are those of the trace


def test_it_is_found_through_measure():
    matrix = wishart(40, seed=3)
    model = Quadratic(matrix)
    record = geomwatch.measure(
        model,
        quadratic_loss,
        torch.ones(4, dtype=torch.float64),
        how=geomwatch.Measurement(quantities=["effective_rank"]),
    )
    found = record["effective_rank"]
    assert found.value == pytest.approx(exact(matrix), abs=4 * found.error)
