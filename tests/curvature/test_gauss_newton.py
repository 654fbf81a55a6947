"""The generalised Gauss-Newton operator against the dense matrix J' H_out J in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import Quadratic, cross_entropy, digits, mlp, quadratic_loss, wishart
from torch import Tensor, nn

import geomwatch
from geomwatch import Measurement, UsageError
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.vectors.layout import generator


def dense_gauss_newton(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Sum over items of J_i' (diag(p_i) - p_i p_i') J_i / n, for the cross-entropy."""
    inputs, _ = batch
    names = [n for n, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(vector: Tensor) -> Tensor:
        pieces = [v.view(s) for v, s in zip(vector.split(sizes), shapes, strict=True)]
        return torch.func.functional_call(model, dict(zip(names, pieces, strict=True)), (inputs,))

    jacobian = torch.func.jacrev(outputs)(flat)  # (n, classes, D)
    p = outputs(flat).softmax(-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ica,icd,idb->ab", jacobian, curvature, jacobian) / len(inputs)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("cut", [False, True])
def test_products_are_those_of_the_dense_matrix(activation: type[nn.Module], cut: bool) -> None:
    model = mlp(64, 8, 10, activation=activation).double()
    batch = digits(48, torch.float64)
    exact = dense_gauss_newton(model, batch)
    window = [(batch[0][:31], batch[1][:31]), (batch[0][31:], batch[1][31:])] if cut else [batch]
    with Objective(model, cross_entropy, window, how=Settings(operator="ggn")) as objective:
        for seed in range(3):
            v = objective.layout.normal(generator(seed))
            torch.testing.assert_close(objective.hvp(v), exact @ v, rtol=1e-10, atol=1e-12)
        assert objective.provenance["operator"] == "ggn"


def test_every_quantity_can_be_had_from_it_and_the_spectrum_is_positive() -> None:
    model, batch = mlp(64, 8, 10).double(), digits(48, torch.float64)
    exact = torch.linalg.eigvalsh(dense_gauss_newton(model, batch))
    record = geomwatch.measure(
        model,
        cross_entropy,
        batch,
        how=Measurement(
            operator="ggn", quantities=["lambda_max", "lambda_min", "trace", "effective_rank"]
        ),
        max_hvps=60,
        samples=64,
    )
    assert record["lambda_max"].value == pytest.approx(float(exact[-1]), rel=1e-4)
    assert record["lambda_min"].value == pytest.approx(0.0, abs=1e-6)
    trace, rank = record["trace"], record["effective_rank"]
    assert abs(trace.value - float(exact.sum())) < 4 * trace.error
    true_rank = float(exact.sum()) ** 2 / float(exact.square().sum())
    assert abs(rank.value - true_rank) < 4 * rank.error
    assert record.provenance["operator"] == "ggn"


def test_the_hessian_that_is_indefinite_has_an_effective_rank_with_it_only() -> None:
    torch.manual_seed(3)
    model, batch = mlp(64, 8, 10), digits(48)
    plain = geomwatch.measure(
        model, cross_entropy, batch, how=Measurement(quantities=["effective_rank"])
    )
    assert plain["effective_rank"].value is None
    assert 'operator="ggn"' in plain["effective_rank"].reason
    other = geomwatch.measure(
        model, cross_entropy, batch, how=Measurement(quantities=["effective_rank"], operator="ggn")
    )
    assert other["effective_rank"].value > 1


def test_an_output_object_is_used_by_its_logits() -> None:
    class Output(dict):  # as of a Hugging Face model: the loss among the outputs
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(64, 8, 10).double()

        def forward(self, inputs: Tensor, labels: Tensor) -> Output:
            hidden = self.net[1](self.net[0](inputs))
            logits = self.net[2](hidden)
            return Output(loss=F.cross_entropy(logits, labels), logits=logits, hidden=hidden)

    model, batch = Model(), digits(48, torch.float64)
    named = {"inputs": batch[0], "labels": batch[1]}
    exact = dense_gauss_newton(model.net, batch)
    with Objective(model, geomwatch.model_loss, [named], how=Settings(operator="ggn")) as objective:
        v = objective.layout.normal(generator(0))
        torch.testing.assert_close(objective.hvp(v), exact @ v, rtol=1e-10, atol=1e-12)


def test_a_loss_with_weight_decay_inside_is_refused() -> None:
    def decayed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = sum(p.square().sum() for p in model.parameters())
        return cross_entropy(model, batch) + 0.1 * penalty

    record = geomwatch.measure(
        mlp(64, 8, 10),
        decayed,
        digits(32),
        how=Measurement(operator="ggn", quantities=["loss", "lambda_max"]),
    )
    assert record["loss"].value is not None
    assert "through the model's outputs only" in record["lambda_max"].reason


def test_a_model_that_returns_its_loss_is_refused() -> None:
    model = Quadratic(wishart(4, seed=0))
    with (
        Objective(
            model, quadratic_loss, [torch.ones(3)], how=Settings(operator="ggn")
        ) as objective,
        pytest.raises(UsageError, match="needs a loss of the model's outputs, got none"),
    ):
        objective.hvp(torch.ones(4, dtype=torch.float64))


def test_differences_of_gradients_are_no_way_to_it() -> None:
    with (
        Objective(
            mlp(64, 8, 10),
            cross_entropy,
            [digits(32)],
            how=Settings(operator="ggn", hvp="finite_difference"),
        ) as objective,
        pytest.raises(UsageError, match=r"needs double backward.*\(asked for\)"),
    ):
        objective.hvp(objective.layout.zeros())


def test_a_monitor_leaves_no_trace_with_it() -> None:
    def train(watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        monitor = geomwatch.Monitor(
            model, cross_entropy, optimizer, how=Measurement(operator="ggn"), every=2
        )
        for _ in range(5):
            optimizer.zero_grad()
            cross_entropy(model, digits(64)).backward()
            if watch:
                monitor.step(digits(64))
            optimizer.step()
        if watch:
            assert [r.provenance["operator"] for r in monitor.history] == ["ggn"] * 3
            assert all(r["stability_margin"].value > 0 for r in monitor.history)
        assert not model._forward_hooks
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(False), train(True), strict=True))
