"""Gradient noise against synthetic gradients, the stochastic margin against random recursions."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor

from geomwatch.estimators.noise import (
    Moments,
    Spread,
    gradient_noise_scale,
    jackknife,
    spread_of,
    temperature,
)
from geomwatch.estimators.stochastic_margin import stochastic_margin, stochastic_margin_at
from geomwatch.stability.recursion import Recursion

EVEN, UNEVEN = (8, 8, 8, 8), (20, 3, 1, 8)
SIGMA = torch.linspace(0.1, 2.0, 12, dtype=torch.float64)  # one item's standard deviations
MEAN = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)


def draw(items, seed: int, mean: Tensor = MEAN) -> list[tuple[int, Tensor]]:
    """Micro-batch gradients: the mean of n items with covariance diag(SIGMA^2) each."""
    rng = torch.Generator().manual_seed(seed)
    return [
        (n, mean + SIGMA * torch.randn(12, generator=rng, dtype=torch.float64) / math.sqrt(n))
        for n in items
    ]


def mean_of(values) -> tuple[float, float]:
    """Mean and four standard errors."""
    values = list(values)
    return statistics.fmean(values), 4 * statistics.stdev(values) / math.sqrt(len(values))


@pytest.mark.parametrize("items", [EVEN, UNEVEN, (4, 28)])
def test_noise_and_signal_are_unbiased_over_seeds(items):
    spreads = [spread_of(draw(items, seed)) for seed in range(3_000)]
    noise, tolerance = mean_of(s.all.noise for s in spreads)
    assert noise == pytest.approx(float(SIGMA.square().sum()), abs=tolerance)
    assert tolerance < 0.05 * noise
    signal, tolerance = mean_of(s.all.signal for s in spreads)
    assert signal == pytest.approx(float(MEAN.square().sum()), abs=tolerance)
    assert tolerance < 0.05 * signal


def test_it_is_mccandlishs_estimate_where_micro_batches_are_even():
    pieces = draw(EVEN, seed=1)
    small, big = 8, 32
    g_small = statistics.fmean(float(g @ g) for _, g in pieces)
    g_big = float(torch.stack([g for _, g in pieces]).mean(0).square().sum())
    signal = (big * g_big - small * g_small) / (big - small)
    noise = (g_small - g_big) / (1 / small - 1 / big)
    found = gradient_noise_scale(spread_of(pieces))
    assert found.value == pytest.approx(noise / signal, rel=1e-10)
    assert (found.error_kind, found.hvps) == ("stderr", 0)


@pytest.mark.parametrize("items", [EVEN, UNEVEN])
def test_without_each_micro_batch_the_moments_are_those_of_the_others(items):
    pieces = draw(items, seed=2)
    for i, found in enumerate(spread_of(pieces).without):
        others = spread_of(pieces[:i] + pieces[i + 1 :]).all
        assert found.noise == pytest.approx(others.noise, rel=1e-10)
        assert found.signal == pytest.approx(others.signal, rel=1e-10)


@pytest.mark.parametrize(("signal", "items"), [(1.0, 64), (0.3, 24)])
def test_the_noise_scale_is_near_its_truth_within_its_error(signal, items):
    truth = float(SIGMA.square().sum() / (signal * MEAN).square().sum())
    spreads = [spread_of(draw([items] * 32, seed, signal * MEAN)) for seed in range(200)]
    found = [gradient_noise_scale(s) for s in spreads]
    values, errors = [f.value for f in found], [f.error for f in found]
    assert statistics.fmean(values) == pytest.approx(truth, rel=0.06)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(values), rel=0.2)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    left_out = [(sum(values) - v) / 4 for v in values]
    assert jackknife(left_out) == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_noise_that_hides_the_gradient_is_withheld():
    spreads = [spread_of(draw(EVEN, seed, mean=torch.zeros_like(MEAN))) for seed in range(40)]
    hidden = [gradient_noise_scale(s) for s in spreads if s.all.signal <= 0]
    assert len(hidden) > 10
    assert {(h.value, h.status) for h in hidden} == {(None, "withheld")}
    assert "the noise hides the gradient" in hidden[0].reason


def test_two_micro_batches_give_a_value_without_an_error():
    spread = spread_of(draw((16, 16), seed=3))
    for found in (gradient_noise_scale(spread), temperature(spread, lr=0.1, dim=12)):
        assert found.value > 0
        assert (found.error, found.error_kind) == (None, "none")
        assert "no error" in found.reason


def test_one_micro_batch_is_refused():
    with pytest.raises(ValueError, match=r"pieces must hold two or more micro-batches, got 1"):
        spread_of(draw((16,), seed=0))


def test_a_weight_is_a_change_of_coordinates():
    weight = torch.linspace(0.5, 3.0, 12, dtype=torch.float64)
    pieces = draw(UNEVEN, seed=4)
    scaled = [(n, weight.sqrt() * g) for n, g in pieces]
    found, expected = spread_of(pieces, weight=weight), spread_of(scaled)
    assert found.all.noise == pytest.approx(expected.all.noise, rel=1e-10)
    assert found.all.signal == pytest.approx(expected.all.signal, rel=1e-10)


def test_a_spread_far_below_the_mean_survives_float32():
    off = torch.tensor([1.0, -1.0, 0.0, 0.0]) * 1e-3
    pieces = [(1, torch.full((4,), 100.0) + off), (1, torch.full((4,), 100.0) - off)]
    assert spread_of(pieces).all.noise == pytest.approx(4e-6, rel=0.01)


def test_items_of_a_real_net_predict_the_noise_of_its_batches():
    """tr(Sigma) from 8 micro-batches against the covariance over all per-item gradients."""
    model, (inputs, targets) = mlp(64, 16, 10), digits(256)

    def gradient(pick) -> Tensor:
        loss = cross_entropy(model, (inputs[pick], targets[pick]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    each = torch.stack([gradient([i]) for i in range(256)])
    truth = float(each.var(0).sum())
    bounds = [0, 40, 50, 90, 130, 140, 180, 220, 256]
    order = torch.randperm(256)
    pieces = [
        (stop - start, gradient(order[start:stop])) for start, stop in itertools.pairwise(bounds)
    ]
    found = spread_of(pieces)
    assert found.all.noise == pytest.approx(truth, rel=0.2)
    assert found.items == 256
    scale = gradient_noise_scale(found)
    whole = float(each.mean(0).square().sum()) - truth / 256
    assert scale.value == pytest.approx(truth / whole, abs=4 * scale.error)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_temperature_is_that_of_the_batch_gradients_covariance(momentum):
    lr, items = 0.1, 32
    exact = lr * float(SIGMA.square().sum()) / items / (2 * 12 * (1 - momentum))
    found = [
        temperature(spread_of(draw(UNEVEN, s)), lr=lr, dim=12, momentum=momentum)
        for s in range(2_000)
    ]
    value, tolerance = mean_of(f.value for f in found)
    assert value == pytest.approx(exact, abs=tolerance)
    assert tolerance < 0.05 * value
    even = [temperature(spread_of(draw([8] * 12, s)), lr=lr, dim=12) for s in range(400)]
    spread = statistics.stdev(f.value for f in even)
    assert statistics.fmean(f.error for f in even) == pytest.approx(spread, rel=0.15)


def heavy_ball(rate: float, mu: float) -> Recursion:
    return Recursion(rate, memory=mu, intake=1, direct=0, through=1)


def random_recursion(rng: np.random.Generator, kind: str) -> Recursion:
    rate, b = 10 ** rng.uniform(-4, -1), rng.uniform(0, 0.97)
    match kind:
        case "sgd":
            return Recursion(rate)
        case "heavy ball":
            return heavy_ball(rate, b)
        case "nesterov":
            return Recursion(rate, memory=b, intake=1, direct=1, through=b)
        case "adam":
            return Recursion(rate, memory=b, intake=1 - b, direct=0, through=1)
        case "adamw":
            keep = 1 - rng.uniform(0, 0.05)
            return Recursion(rate, memory=b, intake=1 - b, direct=0, through=1, keep=keep)
        case _:
            direct = rng.uniform(0.01, 0.5)
            return Recursion(rate, memory=b, intake=1 - b, direct=direct, through=1 - direct)


def radius(r: Recursion, factor: float, curvature: float, variance: float) -> float:
    """Spectral radius of E[M (x) M], M the step's matrix at curvature +- its deviation."""
    rate, total = factor * r.rate, 0.0
    for h in (curvature - math.sqrt(variance), curvature + math.sqrt(variance)):
        m = np.array([[r.keep, 0.0], [r.intake * h, r.memory]])
        m[0] += [-rate * (r.direct + r.through * r.intake) * h, -rate * r.through * r.memory]
        total = total + np.kron(m, m) / 2
    return float(abs(np.linalg.eigvals(total)).max())


KINDS = ["sgd", "heavy ball", "nesterov", "adam", "adamw", "nadam"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_stochastic_margin_is_where_the_spectral_radius_passes_one(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(40):
        r, curvature = random_recursion(rng, kind), 10 ** rng.uniform(-1, 3)
        variance = curvature**2 * 10 ** rng.uniform(-3, 2)
        low, high = 0.0, 1.0
        while radius(r, high, curvature, variance) < 1:
            low, high = high, 2 * high
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            stable = radius(r, middle, curvature, variance) < 1
            low, high = (middle, high) if stable else (low, middle)
        found = stochastic_margin_at(r, curvature, variance)
        assert found == pytest.approx(1 / high, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_it_is_the_deterministic_margin(kind):
    rng = np.random.default_rng(7)
    for _ in range(10):
        r, curvature = random_recursion(rng, kind), 10 ** rng.uniform(-1, 3)
        expected = r.rate * curvature / r.threshold
        assert stochastic_margin_at(r, curvature, 0.0) == pytest.approx(expected, rel=1e-9)


def test_heavy_ball_has_its_closed_form_from_micro_batches():
    """Even micro-batches: N = eta [mean ||H_b q||^2 - ||Hq||^2] / ((K-1) lam 2(1-mu))."""
    eta, mu, curvature = 0.01, 0.9, 40.0
    pieces = [(n, 10 * g) for n, g in draw(EVEN, seed=5)]
    products = torch.stack([hq for _, hq in pieces])
    scatter = float(products.square().sum(1).mean() - products.mean(0).square().sum())
    noise = eta * scatter / (3 * curvature * 2 * (1 - mu))
    found = stochastic_margin(spread_of(pieces), heavy_ball(eta, mu), curvature=curvature)
    assert found.value == pytest.approx(curvature * eta / (2 * (1 + mu)) + noise, rel=1e-10)
    assert found.error_kind == "stderr"
    assert 0 < found.error < found.value


def test_uneven_micro_batches_find_the_variance_of_the_whole_batchs_curvature():
    """Items with curvature 10 +- 5: the mean over seeds is the margin at variance 25 / N."""
    q = torch.tensor([1.0, 0.0], dtype=torch.float64)
    values = []
    for seed in range(2_000):
        rng = torch.Generator().manual_seed(seed)
        h = [10 + 5 * torch.randn(n, generator=rng, dtype=torch.float64).mean() for n in UNEVEN]
        pieces = [(n, x * q) for n, x in zip(UNEVEN, h, strict=True)]
        values.append(stochastic_margin(spread_of(pieces), heavy_ball(0.01, 0.9), curvature=10.0))
    mean, tolerance = mean_of(v.value for v in values)
    exact = stochastic_margin_at(heavy_ball(0.01, 0.9), 10.0, 25 / sum(UNEVEN))
    assert mean == pytest.approx(exact, abs=tolerance)
    assert tolerance < 0.2 * (exact - stochastic_margin_at(heavy_ball(0.01, 0.9), 10.0, 0.0))


@pytest.mark.parametrize(("factor", "grows"), [(0.9, False), (1.1, True)])
def test_the_mean_square_of_sgd_on_random_curvatures_grows_exactly_above_one(factor, grows):
    curvature, variance = 3.0, 6.0
    rate = factor / stochastic_margin_at(Recursion(1.0), curvature, variance)
    h = curvature + math.sqrt(variance) * (2.0 * np.random.default_rng(0).integers(0, 2, 10**6) - 1)
    # E w_t^2 of plain SGD is the t-th power of E (1 - rate h)^2
    assert (((1 - rate * h) ** 2).mean() > 1) is np.bool_(grows)


def test_a_curvature_that_is_not_positive_has_no_margin():
    spread = Spread(32.0, Moments(1.0, 1.0), ())
    found = stochastic_margin(spread, Recursion(0.1), curvature=-2.0)
    assert (found.value, found.status) == (None, "withheld")
    assert "not positive" in found.reason


def test_a_momentum_of_one_is_never_stable():
    spread = Spread(32.0, Moments(1.0, 1.0), ())
    found = stochastic_margin(spread, heavy_ball(0.1, 1.0), curvature=2.0)
    assert found.status == "withheld"
    assert "no learning rate is stable" in found.reason
