"""The check of double backward: what it finds, what it lets pass, and what it can't tell."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.agreement import Validation, validate
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings


class SlightlyWrong(torch.autograd.Function):
    """tanh whose backward takes a share of its own slope for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.share = share
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        slope = 1 - torch.tanh(x) ** 2
        return gradient * torch.lerp(slope, slope.detach(), ctx.share), None


class Tanh(nn.Module):
    def __init__(self, share: float, rounds: bool = False) -> None:
        super().__init__()
        self.share, self.rounds = share, rounds

    def forward(self, x: Tensor) -> Tensor:
        # as parts of many models do, whatever their parameters are
        y = SlightlyWrong.apply(x.float() if self.rounds else x, self.share)
        return y.to(x.dtype)


def net(share: float, rounds: bool = False) -> nn.Module:
    model = mlp(64, 12, 12, 10, activation=nn.Tanh)
    model[1] = Tanh(share, rounds)
    return model


def validated(model: nn.Module, loss_fn: Any = cross_entropy, **options: Any) -> Validation:
    options = {"dtype": torch.float64, **options}
    how = Settings(hvp="double_backward")
    return validate(lambda: Objective(model, loss_fn, [digits(4)], how, **options))


@pytest.mark.parametrize("share", [0.005, 0.05, 1.0])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_small_error_is_found_also_behind_rounding_to_float32(share, rounds):
    right, wrong = validated(net(0.0, rounds)), validated(net(share, rounds))
    assert right.passed is True
    assert right.error < (1e-3 if rounds else 1e-8)
    assert wrong.passed is False
    assert wrong.error > 0.1 * share
    assert "double backward is off by" in wrong.reason


def test_the_jacobian_of_a_wrong_double_backward_is_symmetric_and_of_a_detached_loss_is_not():
    def semi(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        return (outputs - outputs.roll(1, 1).detach()).square().mean()

    found = validated(net(0.0), semi)
    assert found.passed is None
    assert "part of the loss is held constant for its gradient" in found.reason
    record = geomwatch.measure(net(0.0), semi, digits(4))
    assert record.provenance["backend"] == "double_backward"
    assert record.provenance["validated"] is True  # against differences with that part held
    assert record.provenance["holds_constants"] is True


def test_noise_is_told_from_an_error():
    def noisy(model: nn.Module, batch: Any) -> Tensor:
        fresh = torch.Generator().manual_seed(next(SEEDS))  # which no probe can put back
        noise = torch.randn(len(batch[0]), 64, generator=fresh, dtype=batch[0].dtype)
        return cross_entropy(model, (batch[0] + noise, batch[1]))

    found = validated(net(0.0), noisy)
    assert found.passed is None
    assert "disagree among themselves" in found.reason


SEEDS = itertools.count()


def test_a_linear_loss_passes():
    found = validated(nn.Linear(64, 3), lambda model, batch: model(batch[0]).sum())
    assert found.passed is True
    assert found.error == 0


def test_what_cannot_run_in_float64_is_told():
    def narrow(model: nn.Module, batch: Any) -> Tensor:
        if batch[0].dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return cross_entropy(model, batch)

    found = validated(net(0.0), narrow)
    assert found == Validation(
        None, reason="it could not be run: RuntimeError: no kernel for Double"
    )


def test_rows_for_padding_are_left_out_on_both_sides():
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=0), nn.Flatten(), nn.Linear(18, 9))
    tokens = torch.randint(0, 4, (8, 3))
    record = geomwatch.measure(model, cross_entropy, (tokens, torch.arange(8)))
    assert record.provenance["validated"] is True
    assert record.provenance["validation_error"] < 1e-8
