"""SGD as a sampler: `temperature` against the stationary covariance of a noisy quadratic."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor, nn

import geomwatch

EIGENVALUES = torch.logspace(0, -1, 6, dtype=torch.float64)
BATCH, ITEMS = 16, 4_096
LR = 0.1


class NoisyQuadratic(nn.Module):
    """L_i(w) = w'Hw / 2 + xi_i . w for items xi_i of mean zero; one row of w for each chain."""

    def __init__(self, chains: int = 1) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(chains, len(EIGENVALUES), dtype=torch.float64))

    def forward(self, xi: Tensor) -> Tensor:
        return 0.5 * (EIGENVALUES * self.w**2).sum() + (xi * self.w).sum(-1).mean()


def items(scale: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    xi = scale * torch.randn(ITEMS, len(EIGENVALUES), generator=rng, dtype=torch.float64)
    return xi - xi.mean(0)


def measured_temperature(xi: Tensor, *, lr: float, momentum: float) -> tuple[float, float]:
    """The mean over batches as SGD draws them, and its standard error."""
    model = NoisyQuadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    rng = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        batch = xi[torch.randint(0, ITEMS, (BATCH,), generator=rng)]
        record = geomwatch.measure(
            model,
            lambda m, x: m(x),
            batch,
            how=geomwatch.Measurement(quantities=["temperature"]),
            optimizer=optimizer,
        )
        found.append(record["temperature"].value)
    return statistics.fmean(found), statistics.stdev(found) / len(found) ** 0.5


def stationary_variances(xi: Tensor, *, lr: float, momentum: float) -> Tensor:
    """Variances of the weights under torch.optim.SGD, over chains and late steps."""
    chains, steps = 600, 1_200
    model = NoisyQuadratic(chains)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    rng = torch.Generator().manual_seed(2)
    squares, count = torch.zeros(len(EIGENVALUES), dtype=torch.float64), 0
    for step in range(steps):
        noise = xi[torch.randint(0, ITEMS, (chains, BATCH), generator=rng)].mean(1)
        # of each chain's own batch loss
        model.w.grad = EIGENVALUES * model.w.detach() + noise
        optimizer.step()
        if step >= steps // 2 and step % 20 == 0:
            squares += model.w.detach().square().mean(0)
            count += 1
    return squares / count


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_each_direction_holds_the_measured_temperature_where_the_noise_is_isotropic(momentum):
    """lambda_i <w_i^2> = T 2(1+mu) / (2(1+mu) - lr lambda_i): T itself as lr goes to zero.

    So p ~ exp(-w'Hw / 2T). Without the 1/2 each direction would hold T / 2.
    """
    lr = LR * (1 - momentum)
    xi = items(torch.ones(len(EIGENVALUES), dtype=torch.float64))
    T, error = measured_temperature(xi, lr=lr, momentum=momentum)
    energies = EIGENVALUES * stationary_variances(xi, lr=lr, momentum=momentum)
    limit = 2 * (1 + momentum)
    predicted = T * limit / (limit - lr * EIGENVALUES)
    assert error < 0.02 * T
    assert (energies / predicted).mean() == pytest.approx(1, abs=0.05)
    assert ((energies / predicted) - 1).abs().max() < 0.2


def test_the_mean_over_directions_holds_it_where_the_noise_is_like_the_curvature():
    """Noise of covariance c H: the mean energy is T, but no direction's own is.

    The weights then spread alike in all directions, <w_i^2> = lr c / 2, sharp or flat: not Gibbs.
    """
    xi = items(EIGENVALUES.sqrt())
    T, error = measured_temperature(xi, lr=LR, momentum=0.0)
    variances = stationary_variances(xi, lr=LR, momentum=0.0)
    energies = EIGENVALUES * variances * (2 - LR * EIGENVALUES) / 2
    assert error < 0.03 * T
    assert float(energies.mean()) == pytest.approx(T, rel=0.08)
    assert variances.max() / variances.min() < 1.3
    assert energies.max() / energies.min() > 7  # ten, as the eigenvalues are
