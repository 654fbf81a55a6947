"""Weight norm and spectral norm in a probe: the same values, and a second derivative."""

from __future__ import annotations

import pytest
import torch
from problems import cross_entropy, digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.isolation.twice_differentiable import spectral_norm_held, weight_norm_written_out
from geomwatch.isolation.undo import until_here

DOUBLE = {"dtype": torch.float64, "requires_grad": True}


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_the_weight_norm_of_a_probe_has_torchs_values_and_both_derivatives(dim):
    v = torch.randn(3, 2, 4, **DOUBLE)
    g = torch.rand_like(torch.norm_except_dim(v, 2, dim), requires_grad=True)
    own = torch._weight_norm(v, g, dim)
    with until_here():
        weight_norm_written_out()
        assert torch.allclose(torch._weight_norm(v, g, dim), own, rtol=1e-14, atol=0)
        assert torch.autograd.gradcheck(lambda *w: torch._weight_norm(*w, dim), (v, g))
        assert torch.autograd.gradgradcheck(lambda *w: torch._weight_norm(*w, dim), (v, g))


def norms_of_torch() -> list[object]:
    hooks = nn.utils.spectral_norm.__globals__["SpectralNorm"]
    return [
        torch._weight_norm,
        nn.utils.weight_norm.__globals__["_weight_norm"],
        hooks.compute_weight,
        parametrizations._SpectralNorm._power_method,
    ]


def test_torchs_norms_are_back_after_a_probe_also_if_it_fails():
    before, inside = norms_of_torch(), []

    def fail() -> None:
        with until_here():
            weight_norm_written_out()
            spectral_norm_held()
            inside.extend(norms_of_torch())
            raise KeyError("midway")

    with pytest.raises(KeyError, match="midway"):
        fail()
    assert not any(a is b for a, b in zip(before, inside, strict=True))
    assert all(a is b for a, b in zip(before, norms_of_torch(), strict=True))


class Critic(nn.Module):
    """A GAN's: its loss evaluates it twice, and each time its vectors would move on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(64, 12)),
            nn.Tanh(),
            parametrizations.spectral_norm(nn.Linear(12, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def of_both(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    real, fake = batch[0], batch[0].flip(1)
    return (model(fake).exp() - model(real)).mean()


def test_a_loss_that_evaluates_a_spectral_norm_twice_is_validated():
    record = geomwatch.measure(Critic(), of_both, digits(32))
    assert record.provenance["validated"] is True
    assert record.provenance["backend"] == "double_backward"


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_the_loss_along_a_line_has_the_slope_and_curvature_that_are_measured(norm):
    model = nn.Sequential(norm(nn.Linear(64, 12)), nn.Tanh(), norm(nn.Linear(12, 10))).double()
    batch = digits(32, torch.float64)
    with Objective(model, cross_entropy, [batch]) as objective:
        v = objective.layout.normal(torch.Generator().manual_seed(0))
        slope, curvature = float(objective.gradient() @ v), float(objective.hvp(v) @ v)
        h = 1e-4
        behind, here, ahead = (objective.loss_at(t * v) for t in (-h, 0.0, h))
    assert (ahead - behind) / (2 * h) == pytest.approx(slope, rel=1e-5)
    assert (ahead - 2 * here + behind) / h**2 == pytest.approx(curvature, rel=1e-5)
