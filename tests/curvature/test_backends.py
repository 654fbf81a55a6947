"""Models whose loss has no second derivative, or a wrong one: measured right, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, dense_hessian, digits, mlp
from silent import IntoBuffer, OnceDifferentiable, RawContext
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.finite_difference import FiniteDifference, NotSmoothError
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.errors import NoCurvatureError
from geomwatch.isolation.precision import recast
from geomwatch.isolation.undo import until_here


class Custom(nn.Module):
    """An MLP with one of the functions above, or with torch's own tanh, as activation."""

    def __init__(self, activation: Any, kinks: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 12), nn.Linear(12, 12)
        self.last = nn.Linear(12, 10)
        self.activation, self.kinks = activation, kinks

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x))
        hidden = self.second(hidden)
        return self.last(hidden.relu() if self.kinks else hidden.tanh())


@pytest.mark.parametrize("kinks", [False, True])
@pytest.mark.parametrize("function", [RawContext, OnceDifferentiable, IntoBuffer])
def test_a_backward_that_is_not_differentiable_is_found_and_replaced(function, kinks):
    batch = digits(64)
    exact = torch.linalg.eigvalsh(dense_hessian(Custom(torch.tanh, kinks).double(), batch))
    record = geomwatch.measure(Custom(function.apply, kinks), cross_entropy, batch, max_hvps=40)
    assert record.provenance["backend"] == "finite_difference"
    assert record["lambda_max"].value == pytest.approx(float(exact[-1]), rel=2e-3)
    assert record.provenance["validated"] is False
    expected = {
        RawContext: "double backward is off by",
        OnceDifferentiable: "no second derivative",
        IntoBuffer: "arguments don't support automatic differentiation",
    }[function]
    assert expected in str(record.provenance["validation"])


def test_an_error_that_a_plain_backward_has_too_is_passed_on():
    class Broken(RawContext):
        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise ValueError("lost the weights")

    with (
        Objective(Custom(Broken.apply, False), cross_entropy, [digits(8)]) as objective,
        pytest.raises(Exception, match="lost the weights"),
    ):
        objective.hvp(objective.layout.zeros() + 1)


def test_where_differences_in_float32_cross_kinks_float64_takes_over():
    model, batch = mlp(64, 64, 32, 10), digits(128)
    with Objective(model, cross_entropy, [batch]) as one:
        v = one.gradient()
        exact = one.hvp(v)
    with Objective(model, cross_entropy, [batch], how=Settings(hvp="finite_difference")) as two:
        assert (two.hvp(v) - exact).norm() < 1e-5 * exact.norm()
        assert two.provenance["dtype"] == "float64"
        assert two.gradient().dtype == torch.float32


def test_a_monitor_warns_once_of_a_silently_wrong_backward(caplog):
    # with a kink too, or differences of the step's own gradient would do
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), Custom(RawContext.apply, False))
    batch = digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, every=1)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        assert monitor.step(batch).provenance["backend"] == "finite_difference"
        optimizer.step()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "double backward is off by" in warnings[0]
    assert "differences of gradients instead" in warnings[0]


def test_double_backward_alone_would_have_been_wrong_on_it():
    batch = digits(64)
    exact = float(torch.linalg.eigvalsh(dense_hessian(Custom(torch.tanh, False), batch))[-1])
    record = geomwatch.measure(
        Custom(RawContext.apply, False),
        cross_entropy,
        batch,
        how=geomwatch.Measurement(hvp="double_backward"),
        max_hvps=40,
    )
    assert abs(record["lambda_max"].value / exact - 1) > 0.02
    assert record.provenance["validated"] is False


def test_a_sound_model_is_validated_and_keeps_double_backward():
    record = geomwatch.measure(mlp(64, 12, 10), cross_entropy, digits(64))
    assert record.provenance["backend"] == "double_backward"
    assert record.provenance["validated"] is True
    assert record.provenance["validation_error"] < 1e-6


def test_ctc_loss_is_measured_by_differences():
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    inputs = torch.randn(12, 3, 6)
    targets = torch.randint(1, 5, (3, 4))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        lengths = torch.full((3,), 12), torch.full((3,), 4)
        return F.ctc_loss(model(x.transpose(0, 1)).log_softmax(-1), y, *lengths)

    batch = (inputs.transpose(0, 1), targets)
    record = geomwatch.measure(model, loss_fn, batch, max_hvps=35)
    assert record.provenance["backend"] == "finite_difference"
    assert "_ctc_loss" in str(record.provenance["fallback"])
    with Objective(
        model, loss_fn, [batch], how=Settings(hvp="finite_difference"), dtype=torch.float64
    ) as o:
        columns = [o.hvp(e) for e in torch.eye(o.layout.dim)]
    exact = torch.linalg.eigvalsh(torch.stack(columns).double())
    assert record["lambda_max"].value == pytest.approx(float(exact[-1]), rel=1e-3)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_differences_in_float32_agree_with_double_backward_on_smooth_nets(activation):
    model, batch = mlp(64, 32, 16, 10, activation=activation), digits(128)
    with Objective(model, cross_entropy, [batch]) as one:
        directions = [one.gradient(), one.layout.normal(torch.Generator().manual_seed(1))]
        exact = [one.hvp(v) for v in directions]
    with Objective(model, cross_entropy, [batch], how=Settings(hvp="finite_difference")) as two:
        for v, hv in zip(directions, exact, strict=True):
            assert (two.hvp(v) - hv).norm() < 3e-4 * hv.norm()
        assert two.provenance["dtype"] == "float32"


def test_differences_across_kinks_are_refused_in_float32():
    model, batch = mlp(64, 64, 32, 10), digits(128)
    with Objective(model, cross_entropy, [batch]) as objective:
        norm = float(objective.gradient().norm())
        difference = FiniteDifference(norm, torch.float32)
        with pytest.raises(NotSmoothError, match="the loss has kinks"):
            difference(objective.gradient_at, objective.gradient())


def test_bfloat16_parameters_go_on_to_float64_where_differences_cross_kinks():
    torch.manual_seed(0)
    model = mlp(64, 64, 32, 10).to(torch.bfloat16)
    x, y = digits(128)
    batch = (x.to(torch.bfloat16), y)
    with Objective(model, cross_entropy, [batch]) as one:
        v = one.gradient()
        exact = one.hvp(v)
    with Objective(model, cross_entropy, [batch], how=Settings(hvp="finite_difference")) as two:
        assert (two.hvp(v) - exact).norm() < 1e-4 * exact.norm()
        assert two.provenance["dtype"] == "float64"
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_a_part_does_not_recast_the_model_of_its_whole():
    model, batch = mlp(64, 64, 32, 10), digits(512)
    with Objective(model, cross_entropy, [batch], how=Settings(hvp="finite_difference")) as whole:
        v = whole.gradient()
        part = whole.part(4)
        assert part is not None
        with pytest.raises(NoCurvatureError, match="the loss has kinks"):
            part.hvp(v)
        assert torch.get_default_dtype() == torch.float32
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert whole.hvp(v).norm() > 0


def test_a_noisy_gradient_is_refused():
    rng = torch.Generator().manual_seed(0)
    difference = FiniteDifference(1.0, torch.float32)
    with pytest.raises(NotSmoothError, match="two steps differ"):
        difference(lambda d: d + 0.1 * torch.randn(d.shape, generator=rng), torch.ones(20))


def test_the_weights_are_bit_identical_after_differences():
    model, batch = Custom(OnceDifferentiable.apply, True), digits(64)
    before = [p.detach().clone() for p in model.parameters()]
    identity = [id(p) for p in model.parameters()]
    geomwatch.measure(model, cross_entropy, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert identity == [id(p) for p in model.parameters()]
    assert torch.get_default_dtype() == torch.float32


def test_bfloat16_parameters_are_measured_in_float32():
    torch.manual_seed(0)
    model, (x, y) = mlp(64, 16, 10, activation=nn.Tanh).to(torch.bfloat16), digits(64)
    wide = mlp(64, 16, 10, activation=nn.Tanh)
    wide.load_state_dict(model.state_dict())
    batch = (x.to(torch.bfloat16), y)
    exact = dense_hessian(wide, (x.to(torch.bfloat16).double(), y))
    record = geomwatch.measure(model, cross_entropy, batch, max_hvps=30)
    assert record.provenance["dtype"] == "float32"
    assert record["lambda_max"].value == pytest.approx(
        float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-4
    )
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_an_lstm_is_recast_and_put_back():
    torch.manual_seed(0)
    model = nn.LSTM(4, 6, batch_first=True)
    x = torch.randn(3, 5, 4)
    before = model(x)[0].detach()
    with until_here():
        recast([model], torch.float64)
        assert model(x.double())[0].dtype == torch.float64
    assert torch.equal(model(x)[0], before)


def test_a_compiled_model_is_measured_like_the_plain_one():
    torch.manual_seed(0)
    plain, batch = mlp(64, 16, 10), digits(64)
    compiled = torch.compile(plain, backend="aot_eager")
    cross_entropy(compiled, batch).backward()
    values = [
        geomwatch.measure(m, cross_entropy, batch)["lambda_max"].value for m in (plain, compiled)
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def in_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(model, batch)


def test_an_autocast_that_the_loss_enters_is_overridden_unless_asked_for():
    model, batch = mlp(64, 16, 10), digits(64)
    plain, cast, training = (
        geomwatch.measure(model, loss_fn, batch, how=geomwatch.Measurement(precision=precision))
        for loss_fn, precision in [
            (cross_entropy, "float32"),
            (in_autocast, "float32"),
            (in_autocast, "training"),
        ]
    )
    assert cast["lambda_max"].value == plain["lambda_max"].value
    assert training["lambda_max"].value != plain["lambda_max"].value
    assert training["lambda_max"].value == pytest.approx(plain["lambda_max"].value, rel=0.05)
    assert (cast.provenance["precision"], training.provenance["precision"]) == (
        "float32",
        "training",
    )
    with torch.autocast("cpu", torch.bfloat16):  # and works as before
        assert model(batch[0]).dtype == torch.bfloat16


def test_an_unknown_precision_is_refused():
    with pytest.raises(geomwatch.UsageError, match='precision must be "float32" or "training"'):
        geomwatch.measure(
            mlp(64, 10), cross_entropy, digits(8), how=geomwatch.Measurement(precision="half")
        )


def test_an_unknown_backend_is_refused():
    with pytest.raises(geomwatch.UsageError, match='hvp must be "auto" or "double_backward"'):
        geomwatch.measure(
            mlp(64, 10), cross_entropy, digits(8), how=geomwatch.Measurement(hvp="forward")
        )
