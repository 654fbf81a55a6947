"""Train and eval mode hold for every evaluation, and are put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import cross_entropy
from states import assert_same, everything
from torch import Tensor, nn
from undisturbed import noisy_mlp

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings


def modes_in_a_probe(model: nn.Module, mode: str) -> list[list[bool]]:
    """The flags at each of two evaluations of a probe."""
    seen: list[list[bool]] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append([m.training for m in model.modules()])
        return cross_entropy(model, batch)

    batch = (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with Objective(model, loss_fn, [batch], how=Settings(mode=mode)) as objective:
        objective.gradient()
        objective.loss_at(torch.zeros(objective.layout.dim))
    return seen


def test_eval_mode_holds_for_every_evaluation_and_is_put_back():
    model = noisy_mlp()
    assert modes_in_a_probe(model, "eval") == [[False] * 7] * 2
    assert [m.training for m in model.modules()] == [True] * 7


def test_train_mode_holds_for_every_evaluation_of_a_model_in_eval():
    model = noisy_mlp().eval()
    assert modes_in_a_probe(model, "train") == [[True] * 7] * 2
    assert [m.training for m in model.modules()] == [False] * 7


def test_a_batchnorm_that_the_user_holds_in_eval_stays_so():
    model = noisy_mlp()
    model[1].eval()
    flags = [m.training for m in model.modules()]
    assert modes_in_a_probe(model, "train") == [flags] * 2
    assert [m.training for m in model.modules()] == flags


def test_eval_mode_measures_the_loss_of_evaluation():
    model, batch = noisy_mlp(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    model[2] = nn.Identity()  # no noise
    record = geomwatch.measure(model, cross_entropy, batch, how=geomwatch.Measurement(mode="eval"))
    assert record.loss == cross_entropy(model.eval(), batch).item()
    assert record.provenance["mode"] == "eval"


class Merging(nn.Module):
    """Changes its weights when its mode changes, as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def train(self, mode: bool = True) -> Merging:
        self.linear.weight.data.add_(1.0 if mode else -1.0)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_weights_that_change_with_the_mode_are_put_back():
    model, batch = Merging(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    before = everything(model)
    record = geomwatch.measure(model, cross_entropy, batch, how=geomwatch.Measurement(mode="eval"))
    assert_same(before, everything(model))
    assert record.loss == pytest.approx(cross_entropy(model.eval(), batch).item(), rel=1e-6)
