"""The spectral density against known spectra, within its own error band."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from problems import Quadratic, cross_entropy, dense_hessian, digits, mlp, quadratic_loss, wishart
from scipy import stats
from states import assert_same, everything

from geomwatch import Measurement, landscape
from geomwatch.errors import UsageError
from geomwatch.landscape.density import Run, lanczos_nodes, quadrature, student_t

ONES = [torch.ones(2, dtype=torch.float64)]


def smoothed(eigenvalues: np.ndarray, grid: np.ndarray, sigma: float) -> np.ndarray:
    z = (grid[:, None] - eigenvalues) / sigma
    return np.exp(-0.5 * z * z).mean(axis=1) / (sigma * math.sqrt(2 * math.pi))


def rotated(eigenvalues: torch.Tensor) -> torch.Tensor:
    """A full matrix: the random signs would see a diagonal one exactly."""
    rng = torch.Generator().manual_seed(7)
    square = torch.randn(2 * (len(eigenvalues),), generator=rng, dtype=torch.float64)
    q = torch.linalg.qr(square).Q
    return (q * eigenvalues) @ q.T


def spectra() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    bulk = 0.3 * torch.randn(500, generator=rng, dtype=torch.float64)
    return {
        "wishart": torch.linalg.eigvalsh(wishart(400, seed=3)),
        "bulk and outliers": torch.cat([bulk, torch.tensor([4.0, 4.5, 7.0]).double()]),
        "uniform": torch.linspace(-1, 3, 600, dtype=torch.float64),
        "two points": torch.cat([torch.zeros(300), torch.ones(100)]).double(),
    }


@pytest.mark.parametrize("eigenvalues", spectra().values(), ids=spectra().keys())
def test_a_known_density_lies_within_its_band(eigenvalues):
    model = Quadratic(rotated(eigenvalues))
    covered, whole = [], []
    for seed in range(8):
        found = landscape.density(model, quadratic_loss, ONES, steps=40, how=Measurement(seed=seed))
        truth = smoothed(eigenvalues.numpy(), found.grid, found.sigma)
        inside = abs(found.density - truth) <= found.error + 1e-6 * truth.max()
        covered.append(inside.mean())
        whole.append(inside.all())
        # and the band says something
        assert np.median(found.error) < 0.4 * truth.max()
    assert np.mean(covered) >= 0.98
    assert np.mean(whole) >= 0.6  # of eight; nominally 95 %, 93 % in 120 runs


def test_a_lone_eigenvalue_counts_exactly_once():
    """Without that, a random vector sees it at anything between nothing and ten times."""
    eigenvalues = spectra()["bulk and outliers"]
    model = Quadratic(rotated(eigenvalues))
    found = landscape.density(model, quadratic_loss, ONES, steps=40)
    rough = landscape.density(model, quadratic_loss, ONES, steps=40, outliers=0)
    assert found.exact[:3] == pytest.approx([7.0, 4.5, 4.0], abs=1e-6)
    assert len(rough.exact) == 0
    peak = abs(found.grid - 7.0).argmin()
    height = 1 / (len(eigenvalues) * found.sigma * math.sqrt(2 * math.pi))
    assert found.density[peak] == pytest.approx(height, rel=1e-3)
    assert found.error[peak] < 1e-6 * height
    assert rough.error[abs(rough.grid - 7.0).argmin()] > height


def test_it_integrates_to_one_and_gives_the_trace():
    model = Quadratic(wishart(200, seed=5))
    found = landscape.density(model, quadratic_loss, ONES, vectors=20, steps=30)
    assert np.trapezoid(found.density, found.grid) == pytest.approx(1, abs=1e-3)
    known = len(found.exact) / found.dim
    assert np.nansum(found.weights, axis=1) + known == pytest.approx(np.ones(20))
    exact = float(model.matrix.trace())
    assert abs(found.trace - exact) < 4 * found.trace_error
    assert found.trace_error < 0.3 * exact
    assert (found.hvps, found.dim) == (600, 200)
    assert found.nodes.shape == (20, 30)


def test_the_quadrature_is_exact_in_a_whole_krylov_space():
    """All of the Krylov space: each v' f(H) v to rounding, for any smooth f."""
    matrix = wishart(15, seed=6)
    v = torch.randn(15, dtype=torch.float64)
    nodes, weights = lanczos_nodes(lambda x: matrix @ x, v, 15)
    u = v / v.norm()
    exact = float(u @ torch.linalg.matrix_exp(-matrix) @ u)
    assert float(np.exp(-nodes) @ weights) == pytest.approx(exact, rel=1e-10)
    few, light = lanczos_nodes(lambda x: matrix @ x, v, 4)
    assert float(few**7 @ light) == pytest.approx(
        float(u @ torch.linalg.matrix_power(matrix, 7) @ u), rel=1e-10
    )


def test_the_band_holds_what_the_quadrature_leaves_out():
    """One vector twice has no spread: the band is all error of the quadrature."""
    eigenvalues = torch.linspace(0, 1, 2_000, dtype=torch.float64)
    v = torch.ones(2_000, dtype=torch.float64)
    run = Run(*lanczos_nodes(lambda x: eigenvalues * x, v, 20))
    found = quadrature([run, run], 2_000, sigma=0.03)
    truth = smoothed(eigenvalues.numpy(), found.grid, 0.03)
    # 20 nodes can't resolve it: both are off, and the band knows
    assert abs(found.density - truth).max() > 0.02 * truth.max()
    assert np.mean(abs(found.density - truth) <= 2 * found.error + 1e-6) > 0.9


def test_the_density_of_a_trained_net_is_that_of_its_dense_hessian():
    model, batch = mlp(64, 8, 10), digits(256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    exact = torch.linalg.eigvalsh(dense_hessian(model, batch)).numpy()
    before = everything(model)
    found = landscape.density(model, cross_entropy, [batch], vectors=12, steps=30)
    assert_same(before, everything(model))
    truth = smoothed(exact, found.grid, found.sigma)
    inside = abs(found.density - truth) <= found.error + 1e-4 * truth.max()
    assert np.mean(inside) > 0.9
    assert found.provenance["mode"] == "train"
    assert found.provenance["hvps"] == 360
    halves = [(batch[0][:100], batch[1][:100]), (batch[0][100:], batch[1][100:])]
    split = landscape.density(model, cross_entropy, halves, vectors=12, steps=30)
    assert split.density == pytest.approx(found.density, rel=1e-2, abs=1e-3 * truth.max())


def test_students_t_is_that_of_scipy():
    for freedom, count in [(1, 1), (7, 1), (7, 30), (15, 48)]:
        tail = (1 - 0.95 ** (1 / count)) / 2
        assert student_t(freedom, count) == pytest.approx(stats.t.isf(tail, freedom), rel=2e-3)


def test_a_spectrum_of_one_point_has_a_width():
    found = landscape.density(Quadratic(2 * torch.eye(30).double()), quadratic_loss, ONES, steps=5)
    assert found.grid[found.density.argmax()] == pytest.approx(2, abs=1e-2)
    assert found.trace == pytest.approx(60)
    few = torch.diag(torch.arange(1.0, 5)).double()
    small = landscape.density(Quadratic(few), quadratic_loss, ONES, steps=40)
    assert small.exact == pytest.approx([4, 3, 2, 1])  # all there is
    assert np.trapezoid(small.density, small.grid) == pytest.approx(1, abs=1e-3)
    assert small.error.max() == 0


def test_what_has_no_density_is_refused():
    model = Quadratic(torch.eye(5).double())
    with pytest.raises(UsageError, match="vectors must be an integer >= 2, got 1"):
        landscape.density(model, quadratic_loss, ONES, vectors=1)
    with pytest.raises(UsageError, match="steps must be an integer >= 3, got 2"):
        landscape.density(model, quadratic_loss, ONES, steps=2)
    with pytest.raises(UsageError, match="sigma must be positive and finite, got -1"):
        landscape.density(model, quadratic_loss, ONES, sigma=-1)
    with pytest.raises(UsageError, match="must be finite to have a Hessian"):
        landscape.density(model, lambda m, x: m(x) * math.inf, ONES)


def test_a_density_of_a_loss_that_changes_with_the_call_is_marked():
    model = mlp(64, 8, 10)
    calls = itertools.count()

    def drifting(model, batch):
        return cross_entropy(model, batch) + 0.01 * next(calls)

    steady = landscape.density(model, cross_entropy, [digits(16)], vectors=2, steps=3)
    assert steady.provenance["deterministic"]
    found = landscape.density(model, drifting, [digits(16)], vectors=2, steps=3)
    assert not found.provenance["deterministic"]
    assert found.provenance["repeat_difference"] == pytest.approx(0.01, rel=1e-3)
