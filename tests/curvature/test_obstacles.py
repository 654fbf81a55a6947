"""What is left where there is no curvature to be had, and where memory is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faces import faced
from problems import cross_entropy, dense_hessian, digits, mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import geomwatch
from geomwatch.curvature.locate import module_of, operation_in

Batch = tuple[Tensor, Tensor]


class Cube(torch.autograd.Function):
    """x^3 by a kernel for float32, whose backward can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("the kernel is for float32")
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * slope


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


def awkward() -> nn.Sequential:
    """Kinks for differences in float32, and nothing in float64."""
    return nn.Sequential(mlp(64, 64, 32), nn.ReLU(), nn.Sequential(Cubed(), nn.Linear(32, 10)))


def train(model: nn.Module, *, watch: bool, **options: Any) -> tuple[list[Tensor], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, every=2, **faced(options))
    for _ in range(5):
        optimizer.zero_grad()
        cross_entropy(model, digits(128)).backward()
        if watch:
            monitor.step(digits(128))
        optimizer.step()
    return [*model.state_dict().values(), torch.get_rng_state()], monitor


def test_a_model_without_curvature_trains_on_and_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    bare, _ = train(awkward(), watch=False)
    torch.manual_seed(0)
    watched, monitor = train(awkward(), watch=True)
    assert all(torch.equal(a, b) for a, b in zip(bare, watched, strict=True))
    told = [r.message for r in caplog.records if "curvature can't be measured" in r.message]
    assert len(told) == 1
    assert "Cube in the loss has no second derivative" in told[0]
    assert "It is in module '2.0'" in told[0]
    assert "the kernel is for float32" in told[0]
    assert "params=" in told[0]
    assert len(monitor.history) == 3
    assert monitor.history[-1]["difficulty"].value is None
    for record in monitor.history:
        for name in ("loss", "grad_norm", "critical_lr"):
            assert record[name].value > 0
        assert record["batch_sharpness"].reason.startswith("by differences of losses")
        assert record["batch_sharpness"].error > 0
        assert record.provenance["backend"] == "none"
        assert record["lambda_max"].value is None
        assert "no curvature here" in record["stability_margin"].reason
        assert "once_differentiable" in record.provenance["obstacle"]
        assert record.provenance["validated"] is False


def test_what_is_known_to_fail_is_not_tried_again() -> None:
    model, calls = awkward(), 0

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        calls += geomwatch.is_probing()
        return cross_entropy(model, batch)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(
        model,
        loss_fn,
        optimizer,
        how=geomwatch.Measurement(quantities=["lambda_max"]),
        every=1,
    )
    counts = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(model, digits(128)).backward()
        calls = 0
        monitor.step(digits(128))
        counts.append(calls)
        optimizer.step()
    assert max(counts[1:]) < counts[0]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_sharpness_by_losses_is_that_of_the_dense_hessian(activation: type[nn.Module]) -> None:
    model, batch = mlp(64, 16, 10, activation=activation), digits(128)
    exact = dense_hessian(model, batch)
    gradient = torch.autograd.grad(cross_entropy(model, batch), list(model.parameters()))
    g = torch.cat([x.reshape(-1) for x in gradient])
    expected = float(g.double() @ exact @ g.double() / g.double().square().sum())

    class Opaque(nn.Module):
        """The same model behind a function without second derivative."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(self.model(x).sign() * self.model(x).abs().pow(1 / 3))

    record = geomwatch.measure(
        Opaque(),
        cross_entropy,
        batch,
        how=geomwatch.Measurement(quantities=["batch_sharpness"], hvp="double_backward"),
    )
    found = record["batch_sharpness"]
    assert found.reason == "by differences of losses"
    assert abs(found.value - expected) < max(3 * found.error, 0.02 * abs(expected))


@pytest.mark.parametrize(
    ("message", "operation"),
    [
        ("derivative for aten::_ctc_loss_backward is not implemented", "_ctc_loss_backward"),
        ("Cube in the loss has no second derivative: its backward ...", "Cube"),
        ("torch.compile with aot_autograd does not currently support double backward", None),
    ],
)
def test_the_operation_is_read_from_the_message(message: str, operation: str | None) -> None:
    assert operation_in(message) == operation


def test_an_operation_outside_of_all_modules_is_in_none() -> None:
    model, batch = mlp(64, 8, 10), digits(16)

    def evaluate() -> Tensor:
        return F.ctc_loss(
            model(batch[0]).log_softmax(-1)[:, None], batch[1][:3] + 1, (16,), (3,), blank=0
        )

    assert module_of(model, evaluate, "_ctc_loss_backward") is None
    assert module_of(model, evaluate, "ThresholdBackward0") is None
    assert module_of(model, evaluate, "ReluBackward0") == "1"


class Hungry(torch.autograd.Function):
    """The identity, whose gradient can be differentiated for a few items only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, most_items: int) -> Tensor:
        ctx.most_items = most_items
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return Starving.apply(slope, ctx.most_items), None


class Starving(Hungry):
    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        if len(slope) > ctx.most_items:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        return slope.clone(), None


def short_of_memory(most_items: int) -> Any:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(Hungry.apply(model(batch[0]), most_items), batch[1])

    return loss_fn


def watch_once(loss_fn: Any, model: nn.Module, **options: Any) -> geomwatch.Monitor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1, **faced(options))
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(model, digits(128)).backward()
        monitor.step(digits(128))
        optimizer.step()
    return monitor


def test_a_probe_that_runs_out_of_memory_is_repeated_in_pieces(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(1)
    monitor = watch_once(short_of_memory(32), mlp(64, 16, 10), quantities=["loss", "lambda_max"])
    torch.manual_seed(1)
    free = watch_once(cross_entropy, mlp(64, 16, 10), quantities=["loss", "lambda_max"])
    told = [r.message for r in caplog.records if "out of memory" in r.message]
    assert len(told) == 1
    assert "micro_batch=32 does so from the start" in told[0]
    for mine, other in zip(monitor.history, free.history, strict=True):
        assert mine["loss"].value == pytest.approx(other["loss"].value, rel=1e-5)
        assert mine["lambda_max"].value == pytest.approx(other["lambda_max"].value, rel=0.05)


def test_probing_is_paused_where_pieces_do_not_fit_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = watch_once(short_of_memory(2), mlp(64, 16, 10))
    assert not monitor.history
    assert any("probing is paused after 3 failed probes" in r.message for r in caplog.records)


def test_a_batch_norm_is_not_cut_for_want_of_memory(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
    monitor = watch_once(short_of_memory(32), model)
    assert not monitor.history
    assert any("Tried to allocate 2 GiB" in r.message for r in caplog.records)
    assert not any("micro_batch=32 does so" in r.message for r in caplog.records)
