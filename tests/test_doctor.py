"""The doctor's table against models whose answers are known, and the model left as it was."""

from __future__ import annotations

import copy
import itertools
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.doctor import _round_up, doctor


def normalised() -> nn.Sequential:
    """A net whose first weight stands before a BatchNorm, with dropout after it."""
    hidden = nn.Linear(64, 16, bias=False)
    return nn.Sequential(hidden, nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))


def everything(model: nn.Module) -> list[Any]:
    """All that a diagnosis could disturb, copied."""
    return copy.deepcopy(
        [
            {k: v.numpy().tobytes() for k, v in model.state_dict().items()},
            [p.grad.numpy().tobytes() for p in model.parameters() if p.grad is not None],
            [m.training for m in model.modules()],
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
            random.getstate(),
        ]
    )


class Cube(torch.autograd.Function):
    """x^3 with a backward that autograd takes for linear: it differentiates a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.x**2 * grad


def ctc(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    scores = model(batch[0]).log_softmax(-1).transpose(0, 1)
    lengths = torch.full((len(batch[0]),), 12), torch.full((len(batch[0]),), 4)
    return F.ctc_loss(scores, batch[1], *lengths)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_model_is_left_bit_identical(mode):
    model = normalised()
    model[3].eval()
    cross_entropy(model, digits(32)).backward()
    before = everything(model)
    optimizer = torch.optim.Adam(model.parameters())
    doctor(
        model, cross_entropy, digits(32), how=geomwatch.Measurement(mode=mode), optimizer=optimizer
    )
    assert everything(model) == before
    assert not optimizer.state


def test_batch_norm_and_dropout_are_recognised():
    model = normalised()
    found = doctor(model, cross_entropy, digits(32), optimizer=torch.optim.SGD(model.parameters()))
    assert found.scale_invariant == ("0.weight",)
    assert found.rows["randomness"] == "drawn from global generators, replayed"
    assert found.backend == "double_backward"
    assert found.validated
    assert found.replays
    assert found.limit_known
    assert found.trainable == 64 * 16 + 2 * 16 + 16 * 10 + 10


def test_modules_held_in_another_mode_are_counted():
    model = normalised()
    assert "BatchNorm1d" not in doctor(model, cross_entropy, digits(32)).rows["mode"]
    model[1].eval()
    found = doctor(model, cross_entropy, digits(32))
    assert "1 BatchNorm1d" in found.rows["mode"]
    assert found.scale_invariant == ()  # fixed statistics do not normalise


def test_a_loss_without_randomness_says_so():
    assert doctor(mlp(64, 8, 10), cross_entropy, digits(32)).rows["randomness"] == "none drawn"


def test_frozen_parameters_and_their_dtype_are_counted():
    model = mlp(64, 8, 10).to(torch.bfloat16)
    model[0].requires_grad_(False)
    batch = digits(32, dtype=torch.bfloat16)
    found = doctor(model, cross_entropy, batch)
    assert found.trainable == 90
    assert found.rows["parameters"] == "90 trainable in bfloat16, 520 frozen"
    assert found.rows["HVPs by"] == "double_backward, in float32"
    assert found.rows["batch"] == "32 items"
    assert found.rows["Krylov basis"].startswith("0.00612 MB")  # 17 * 90 * 4 bytes


def test_a_missing_double_backward_is_named():
    model = mlp(8, 16, 6, activation=nn.Tanh)
    batch = torch.randn(8, 12, 8), torch.randint(1, 6, (8, 4))
    found = doctor(model, ctc, batch)
    assert found.backend == "finite_difference"
    assert not found.validated
    assert "_ctc_loss_backward is not implemented" in found.rows["fallback"]


def test_a_silently_wrong_double_backward_is_named():
    model = mlp(64, 10)
    found = doctor(model, lambda m, b: Cube.apply(m(b)).mean(), digits(32)[0])
    assert found.backend == "finite_difference"
    assert not found.validated
    assert "double backward is off by" in found.rows["validation"]
    assert found.rows["fallback"] == "see validation"


def test_randomness_beyond_replay_is_found():
    drift = itertools.count()

    def noisy(model, batch):
        return cross_entropy(model, batch) * (1 + next(drift))

    found = doctor(mlp(64, 10), noisy, digits(32))
    assert not found.replays
    assert "drift" in found.rows["left changed"]
    assert "no function of the weights" in found.rows["evaluated twice"]


def test_an_optimizer_without_a_formula_is_named():
    model = mlp(64, 10)
    found = doctor(
        model, cross_entropy, digits(32), optimizer=torch.optim.LBFGS(model.parameters())
    )
    assert not found.limit_known
    assert "LBFGS finds its step by a search" in found.rows["stability limit"]
    assert "no optimizer" in doctor(model, cross_entropy, digits(32)).rows["stability limit"]


def test_costs_are_in_training_steps_and_set_the_interval(monkeypatch):
    now = [0.0]
    exact = Objective.hvp

    def loss_fn(model, batch):
        now[0] += 1.0  # graph and step: one evaluation each
        return cross_entropy(model, batch)

    def hvp(self, v):
        now[0] += 2.0
        return exact(self, v)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(Objective, "hvp", hvp)
    found = doctor(mlp(64, 10), loss_fn, digits(32), budget=0.05)
    assert found.step_seconds == 1.0
    assert found.costs == {"graph": 1.0, "hvp": 2.0, "probe": 1 + 7 * 2}
    assert found.every == 500  # 15 / 0.05 = 300
    assert doctor(mlp(64, 10), loss_fn, digits(32), budget=0.3).every == 50


def test_the_interval_is_rounded_up_to_a_nice_number():
    steps = [0.1, 10, 10.1, 20, 21, 50, 51, 100, 101, 499, 501, 1001]
    nice = [10, 10, 20, 20, 50, 50, 100, 100, 200, 500, 1000, 2000]
    assert [_round_up(s) for s in steps] == nice


def test_a_probe_that_can_not_be_run_is_a_row_with_the_reason(monkeypatch):
    def broken(self, v):
        raise MemoryError("there is no room for the graph")

    monkeypatch.setattr(Objective, "hvp", broken)
    found = doctor(mlp(64, 10), cross_entropy, digits(32))
    assert found.backend is None
    assert not found.costs
    assert found.every is None
    assert found.step_seconds is not None
    assert "there is no room for the graph" in found.rows["cost of probe"]


def test_a_refused_loss_or_budget_is_raised():
    with pytest.raises(geomwatch.UsageError, match="loss_fn must return a scalar tensor"):
        doctor(mlp(64, 10), lambda m, b: m(b[0]), digits(32))
    with pytest.raises(geomwatch.UsageError, match=r"budget must be .* got 5"):
        doctor(mlp(64, 10), cross_entropy, digits(32), budget=5)
    with pytest.raises(geomwatch.UsageError, match="optimizer must be the torch optimizer"):
        doctor(mlp(64, 10), cross_entropy, digits(32), optimizer="sgd")


def test_nothing_is_printed_and_the_shell_shows_the_table(capsys):
    found = doctor(mlp(64, 10), cross_entropy, digits(32))
    assert capsys.readouterr().out == ""
    assert str(found) == repr(found)
    lines = str(found).splitlines()
    assert f"torch {torch.__version__}" in lines[0]
    assert len(lines) == len(found.rows)
    assert lines[-1].startswith("suggested every")
