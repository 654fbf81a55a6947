"""Loss, gradient and HVPs against dense Hessians, finite differences and algebra."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Quadratic, cross_entropy, dense_hessian, digits, mlp, quadratic_loss, wishart
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import geomwatch
from geomwatch.curvature.objective import Objective
from geomwatch.errors import UsageError
from geomwatch.vectors.layout import Layout


def toy_batch(count: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 5, generator=rng, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(0, 3, (count,), generator=rng)


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def hessian_of(
    model: nn.Module, loss_fn: Any, window: Sequence[Any], layout: Layout | None = None
) -> Tensor:
    """The whole Hessian, column by column through hvp."""
    with Objective(model, loss_fn, window, layout=layout) as objective:
        unit = torch.eye(objective.layout.dim, dtype=objective.layout.dtype)
        return torch.stack([objective.hvp(e) for e in unit], dim=1)


def finite_difference(model: nn.Module, loss_fn: Any, batch: Any, v: Tensor) -> Tensor:
    """(g(w + hv) - g(w - hv)) / 2h for a float64 model in eval mode, by plain backward()."""
    parameters = list(model.parameters())
    pieces = [x.view(p.shape) for x, p in zip(split(v, parameters), parameters, strict=True)]
    step = 1e-5

    def gradient(sign: float) -> Tensor:
        with torch.no_grad():
            for p, piece in zip(parameters, pieces, strict=True):
                p.add_(sign * step * piece)
        model.zero_grad()
        loss_fn(model, batch).backward()
        found = torch.cat([p.grad.to_dense().reshape(-1) for p in parameters])
        with torch.no_grad():
            for p, piece in zip(parameters, pieces, strict=True):
                p.sub_(sign * step * piece)
        return found

    return (gradient(1) - gradient(-1)) / (2 * step)


def split(v: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    return v.split([p.numel() for p in parameters])


# --- against the dense Hessian ---------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SiLU])
def test_an_hvp_is_the_dense_hessian_times_a_vector(activation, dtype, tolerance):
    model, batch = mlp(64, 6, 10, activation=activation).to(dtype), digits(64, dtype)
    exact = dense_hessian(copy.deepcopy(model).double(), batch)
    with Objective(model, cross_entropy, [batch]) as objective:
        rng = torch.Generator().manual_seed(0)
        for _ in range(3):
            v = objective.layout.normal(rng)
            assert objective.hvp(v).dtype == dtype
            assert relative(objective.hvp(v), exact @ v.double()) <= tolerance


def test_the_gradient_and_the_loss_are_those_of_a_training_step():
    model, batch = mlp(5, 8, 3), toy_batch()
    loss = cross_entropy(model, batch)
    loss.backward()
    expected = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    with Objective(model, cross_entropy, [batch]) as objective:
        assert objective.loss() == loss.item()
        assert torch.equal(objective.gradient(), expected)


def test_a_batchnorm_in_train_mode_is_differentiated_through_its_batch_statistics():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = toy_batch(dtype=torch.float64)
    v = torch.randn(47, dtype=torch.float64)
    with Objective(model, cross_entropy, [batch]) as objective:
        found = objective.hvp(v)
    assert relative(found, finite_difference(copy.deepcopy(model), cross_entropy, batch, v)) < 1e-7


def test_curvlinops_agrees_as_an_independent_oracle():
    curvlinops = pytest.importorskip("curvlinops", exc_type=ImportError)
    model, batch = mlp(5, 8, 3, activation=nn.Tanh).double(), toy_batch(dtype=torch.float64)
    parameters = list(model.parameters())
    operator = curvlinops.HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [batch], check_deterministic=False
    )
    v = torch.randn(75, dtype=torch.float64)
    with Objective(model, cross_entropy, [batch]) as objective:
        assert relative(objective.hvp(v), torch.as_tensor(operator @ v)) < 1e-10


# --- algebra ---------------------------------------------------------------------------------

seeds = st.integers(0, 10_000)
coefficients = st.floats(-10, 10, allow_nan=False, width=32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(dim=st.integers(1, 12), seed=seeds, a=coefficients, b=coefficients)
def test_the_hvp_of_a_quadratic_is_its_matrix(dim, seed, a, b):
    rng = torch.Generator().manual_seed(seed)
    matrix = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    matrix = matrix + matrix.T
    model = Quadratic(matrix, torch.randn(dim, generator=rng, dtype=torch.float64))
    u, v = torch.randn(2, dim, generator=rng, dtype=torch.float64)
    scale = torch.tensor([3.0], dtype=torch.float64)
    with Objective(model, quadratic_loss, [scale]) as objective:
        found = objective.hvp(a * u + b * v)
        assert torch.allclose(found, 3 * matrix @ (a * u + b * v), rtol=1e-10, atol=1e-10)
        assert torch.allclose(objective.gradient(), 3 * matrix @ model.w.detach(), rtol=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    activation=st.sampled_from([nn.Tanh, nn.ReLU, nn.Softplus]),
    seed=seeds,
    a=coefficients,
    b=coefficients,
)
def test_the_hessian_of_any_small_net_is_symmetric_and_linear(widths, activation, seed, a, b):
    torch.manual_seed(seed)
    model = mlp(5, *widths, 3, activation=activation).double()
    with Objective(model, cross_entropy, [toy_batch(dtype=torch.float64)]) as objective:
        u, v = torch.randn(2, objective.layout.dim, dtype=torch.float64)
        hu, hv = objective.hvp(u), objective.hvp(v)
        assert float(u @ hv) == pytest.approx(float(v @ hu), rel=1e-9, abs=1e-11)
        combined = objective.hvp(a * u + b * v)
        assert torch.allclose(combined, a * hu + b * hv, rtol=1e-9, atol=1e-10)
        assert not objective.hvp(torch.zeros_like(u)).any()


# --- windows ---------------------------------------------------------------------------------


def test_a_window_of_uneven_batches_is_the_joined_batch():
    model = mlp(5, 8, 3, activation=nn.Tanh).double()
    inputs, labels = toy_batch(14, torch.float64)
    cuts = [(0, 2), (2, 9), (9, 14)]
    window = [{"inputs": inputs[a:b], "labels": labels[a:b]} for a, b in cuts]
    whole = {"inputs": inputs, "labels": labels}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["inputs"]), batch["labels"])

    v = torch.randn(75, dtype=torch.float64)
    with (
        Objective(model, loss_fn, [whole]) as joined,
        Objective(model, loss_fn, window) as parts,
    ):
        assert parts.items == joined.items == 14
        assert parts.loss() == pytest.approx(joined.loss(), rel=1e-12)
        assert relative(parts.gradient(), joined.gradient()) < 1e-12
        assert relative(parts.hvp(v), joined.hvp(v)) < 1e-12


def test_each_batch_of_a_window_draws_a_mask_of_its_own():
    masks: list[Tensor] = []

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        masks.append(F.dropout(torch.ones(64), 0.5))
        return cross_entropy(model, batch)

    with Objective(mlp(5, 3), loss_fn, [toy_batch(), toy_batch()]) as objective:
        objective.gradient()
        objective.hvp(torch.ones(18))
    assert len(masks) == 4
    assert not torch.equal(masks[0], masks[1])  # independent, as in training
    assert torch.equal(torch.stack(masks[:2]), torch.stack(masks[2:]))  # and the same again


@pytest.mark.parametrize("window", [[], [(torch.zeros(0, 5), torch.zeros(0).long())]])
def test_a_window_without_items_is_refused(window):
    with pytest.raises(UsageError, match=r"window must hold items, got \d batches without any"):
        Objective(mlp(5, 3), cross_entropy, window)


# --- randomness ------------------------------------------------------------------------------


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x))


@pytest.mark.parametrize("batches", [1, 2])
def test_with_dropout_the_loss_and_the_hvp_are_deterministic(batches):
    model, v = Random(), torch.randn(147)
    torch.manual_seed(3)
    window = [toy_batch()] * batches
    with Objective(model, cross_entropy, window) as first:
        hv, gradient, loss = first.hvp(v), first.gradient(), first.loss()
        assert torch.equal(first.hvp(v), hv)
        assert first.loss() == loss
    with Objective(model, cross_entropy, window) as second:  # the state was put back, so the same
        assert second.loss() == loss
        assert torch.equal(second.gradient(), gradient)
        assert torch.equal(second.hvp(v), hv)
    torch.manual_seed(4)
    with Objective(model, cross_entropy, window) as other:
        assert other.loss() != loss


class Normalizing(nn.Module):
    """Changes its buffer in place, unseen by autograd, and has it in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("size", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        self.size.data.mul_(0.5).add_(0.5 * x.square().mean(0))
        return self.linear(x * self.linear.weight.mean(0) * self.size)


def look_at_a_part(objective: Objective, v: Tensor, hv: Tensor) -> None:
    assert relative(objective.part(4).hvp(v), hv) > 0.1


def look_elsewhere(objective: Objective, v: Tensor, hv: Tensor) -> None:
    assert objective.loss_at(v) != objective.loss()
    assert not torch.equal(objective.gradient_at(v), objective.gradient())


@pytest.mark.parametrize("look", [look_at_a_part, look_elsewhere])
def test_an_hvp_is_the_same_after_a_look_at_something_else(look):
    model, (inputs, labels) = Normalizing(), toy_batch(64)
    inputs[:16] *= 5
    v = torch.randn(18)
    with Objective(model, cross_entropy, [(inputs, labels)]) as objective:
        hv = objective.hvp(v)
        assert torch.equal(objective.hvp(v), hv)
        look(objective, v, hv)
        assert torch.equal(objective.hvp(v), hv)


def test_a_loss_that_differentiates_itself_can_be_looked_at_elsewhere():
    def penalty(model: nn.Module, inputs: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return slope.square().mean()

    model = mlp(5, 8, 1, activation=nn.Tanh)
    with Objective(model, penalty, [torch.randn(4, 5).requires_grad_()]) as objective:
        nowhere = torch.zeros(objective.layout.dim)
        assert objective.loss_at(nowhere) == objective.loss() > 0
        assert objective.hvp(nowhere + 1).norm() > 0


@pytest.mark.parametrize("batches", [1, 2])
def test_loss_and_gradient_elsewhere_are_those_of_moved_weights(batches):
    model, window = mlp(5, 8, 3), [toy_batch(), toy_batch(7)][:batches]
    before = copy.deepcopy(model.state_dict())
    moved = copy.deepcopy(model)
    with Objective(model, cross_entropy, window) as objective:
        step = 0.1 * objective.layout.normal(torch.Generator().manual_seed(1))
        found = objective.loss_at(step), objective.gradient_at(step)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert objective.loss_at(torch.zeros_like(step)) == objective.loss()
    with torch.no_grad():
        for p, piece in zip(moved.parameters(), objective.layout.unflatten(step), strict=True):
            p.add_(piece)
    with Objective(moved, cross_entropy, window) as there:
        assert found[0] == pytest.approx(there.loss(), rel=1e-6)
        assert torch.equal(found[1], there.gradient())


def test_a_part_is_the_head_of_a_batch_that_is_large_enough():
    model, (inputs, labels) = mlp(5, 3), toy_batch(64)
    with Objective(model, cross_entropy, [(inputs, labels)]) as objective:
        part = objective.part(4)
        with Objective(model, cross_entropy, [(inputs[:16], labels[:16])]) as head:
            assert part.loss() == head.loss()
            assert part.items == 16
        assert objective.part(5) is None
    with Objective(model, cross_entropy, [toy_batch(64), toy_batch(64)]) as objective:
        assert objective.part(4) is None


# --- parameters of every kind ----------------------------------------------------------------


class Partial(nn.Module):
    """One parameter is not used, one enters linearly, one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.curved = nn.Parameter(torch.tensor([0.5, -1.0]))
        self.unused = nn.Parameter(torch.ones(2))
        self.linear = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum() * (self.curved**3).sum() + self.linear.sum() + self.frozen.sum()


def output(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def test_unused_and_linear_parameters_have_zero_rows_and_frozen_ones_none():
    model, x = Partial(), torch.tensor([2.0])
    hessian = hessian_of(model, output, [x])
    expected = torch.zeros(7, 7)
    expected[0, 0], expected[1, 1] = 2 * 6 * 0.5, 2 * 6 * -1.0
    assert torch.allclose(hessian, expected)
    with Objective(model, output, [x]) as objective:
        assert objective.layout.names == ("curved", "unused", "linear")
        assert objective.gradient().tolist() == [1.5, 6.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_a_loss_that_is_linear_in_everything_has_hessian_zero():
    model = nn.Linear(3, 1)
    hessian = hessian_of(model, lambda m, x: m(x).sum(), [torch.ones(2, 3)])
    assert torch.equal(hessian, torch.zeros(4, 4))


def test_a_tied_weight_is_one_parameter_with_the_curvature_of_both_uses():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model = Tied().double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 4, (6,))
    weight = model.first.weight.detach()

    def loss(flat: Tensor) -> Tensor:
        w = flat.view(4, 4)
        return F.cross_entropy(torch.tanh(batch[0] @ w.T) @ w.T, batch[1])

    exact = torch.func.hessian(loss)(weight.reshape(-1))
    assert relative(hessian_of(model, cross_entropy, [batch]), exact) < 1e-12
    assert Layout.of(model).names == ("first.weight",)
    assert Layout.of(model, "second.*").names == ("first.weight",)  # found by its other name too


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attentive(nn.Module):
    """Uses the fused attention that has no double backward, unless a probe switches it off."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 8, dropout=0.0, batch_first=True, activation=F.gelu
        )
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class SparselyEmbedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).sum(1)))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (Recurrent, functools.partial(torch.randn, 6, 4, 5, dtype=torch.float64)),
        (Attentive, functools.partial(torch.randn, 6, 4, 8, dtype=torch.float64)),
        (SparselyEmbedded, functools.partial(torch.randint, 0, 7, (6, 4))),
    ],
)
def test_finite_differences_agree_in_float64(make, inputs):
    model, batch = make().double(), (inputs(), torch.randint(0, 3, (6,)))
    with Objective(model, cross_entropy, [batch]) as objective:
        v = objective.layout.normal(torch.Generator().manual_seed(0))
        v /= v.norm()
        found = objective.hvp(v)
    assert relative(found, finite_difference(model, cross_entropy, batch, v)) < 1e-7


def test_the_fused_attention_of_the_test_above_has_no_second_derivative_of_its_own():
    model, batch = Attentive(), (torch.randn(6, 4, 8), torch.randint(0, 3, (6,)))
    loss = cross_entropy(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attention_for_cpu_backward is not implemented"):
        sum(g.square().sum() for g in gradients).backward()


class Checkpointed(nn.Module):
    """The first of its layers is checkpointed, so no measured parameter comes before it."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(8, 3)
        self.run = functools.partial(checkpoint, use_reentrant=use_reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.second, self.run(self.first, x.requires_grad_())))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_of_both_kinds_change_nothing(use_reentrant):
    model, batch = Checkpointed(use_reentrant).double(), toy_batch(dtype=torch.float64)
    v = torch.randn(147, dtype=torch.float64)
    with Objective(model, cross_entropy, [batch]) as objective:
        gradient, hv = objective.gradient(), objective.hvp(v)
    model.run = lambda part, x: part(x)
    with Objective(model, cross_entropy, [batch]) as objective:
        assert relative(gradient, objective.gradient()) < 1e-12
        assert relative(hv, objective.hvp(v)) < 1e-12
    assert "apply" not in vars(CheckpointFunction)  # training checkpoints as before


def test_a_compiled_model_is_measured_as_it_was_written():
    model, batch = mlp(5, 8, 3, activation=nn.Tanh), toy_batch()
    compiled = torch.compile(model, backend="aot_eager")
    cross_entropy(compiled, batch).backward()  # its graph has no second derivative
    v = torch.randn(75)
    with Objective(compiled, cross_entropy, [batch]) as objective:
        hv = objective.hvp(v)
    with Objective(model, cross_entropy, [batch]) as objective:
        assert relative(hv, objective.hvp(v)) < 1e-6


def test_a_default_device_elsewhere_does_not_matter():
    model, batch = mlp(5, 8, 3, activation=nn.Tanh), toy_batch()
    plain = geomwatch.measure(model, cross_entropy, batch)
    with torch.device("meta"):
        record = geomwatch.measure(model, cross_entropy, batch)
    assert record.estimates == plain.estimates


def test_a_bfloat16_model_is_measured_with_float32_vectors():
    model, batch = mlp(5, 8, 3, activation=nn.Tanh), toy_batch()
    exact = dense_hessian(copy.deepcopy(model).double(), batch)
    half = copy.deepcopy(model).bfloat16()
    with Objective(half, cross_entropy, [(batch[0].bfloat16(), batch[1])]) as objective:
        v = objective.layout.normal(torch.Generator().manual_seed(0))
        hv = objective.hvp(v)
    assert hv.dtype == torch.float32
    assert relative(hv, exact @ v.double()) < 0.05


# --- layouts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("0.*", ["0.weight", "0.bias"]),
        (["*.bias"], ["0.bias", "2.bias"]),
        (["2.weight", "0.b*"], ["0.bias", "2.weight"]),
        (None, ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_patterns_choose_a_block_of_the_hessian(patterns, names):
    model, batch = mlp(5, 4, 3, activation=nn.Tanh).double(), toy_batch(dtype=torch.float64)
    whole = Layout.of(model)
    layout = Layout.of(model, patterns)
    assert list(layout.names) == names
    kept = 1 - whole.mask(layout.names)
    block = dense_hessian(model, batch)[kept.bool()][:, kept.bool()]
    assert relative(hessian_of(model, cross_entropy, [batch], layout), block) < 1e-10


def test_a_vector_is_cut_and_joined_without_loss():
    layout = Layout.of(mlp(5, 4, 3))
    v = torch.arange(layout.dim, dtype=torch.float32)
    pieces = layout.unflatten(v)
    assert [p.shape for p in pieces] == [p.shape for p in layout.params]
    assert torch.equal(layout.flatten(pieces), v)
    with pytest.raises(ValueError, match="vector has 3 elements, the parameters 39"):
        layout.unflatten(v[:3])


def test_the_mass_of_a_vector_is_shared_out_over_the_modules():
    layout = Layout.of(mlp(1, 1, 1))  # 0.weight, 0.bias, 2.weight, 2.bias
    mass = layout.mass_by_module(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    assert mass == pytest.approx({"2": 10 / 12, "0": 2 / 12})
    assert list(mass) == ["2", "0"]


# --- use -------------------------------------------------------------------------------------


def test_an_objective_is_of_use_inside_its_block_only():
    model = mlp(5, 3)
    for window in ([toy_batch()], [toy_batch(), toy_batch()]):
        objective = Objective(model, cross_entropy, window)
        with pytest.raises(RuntimeError, match="inside its `with` block only"):
            objective.gradient()
        with objective:
            gradient = objective.gradient()
        with pytest.raises(RuntimeError, match="inside its `with` block only"):
            objective.hvp(torch.ones(18))
        assert objective.gradient() is gradient  # what is known stays known


def test_an_objective_that_is_entered_again_looks_at_the_weights_of_then():
    model, batch = mlp(5, 3), toy_batch()
    objective = Objective(model, cross_entropy, [batch])
    with objective:
        before = objective.loss()
    with torch.no_grad():
        model[0].weight.mul_(3)
    with objective:
        assert objective.loss() == cross_entropy(model, batch).item() != before
        assert objective.hvp(torch.ones(18)).norm() > 0


def test_hvps_are_counted_and_told_with_how_they_were_made():
    with Objective(mlp(5, 3), cross_entropy, [toy_batch()]) as objective:
        for _ in range(3):
            objective.hvp(torch.ones(18))
        assert objective.hvps == 3
        assert objective.provenance == {
            "backend": "double_backward",
            "dtype": "float32",
            "mode": "train",
            "precision": "float32",
            "items": 9,
            "operator": "hessian",
        }


@pytest.mark.parametrize("batches", [1, 3])
def test_the_graph_of_one_batch_is_built_once_and_of_several_each_time(batches):
    evaluations = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return cross_entropy(model, batch)

    with Objective(mlp(5, 3), loss_fn, [toy_batch()] * batches) as objective:
        objective.loss()
        objective.gradient()
        for _ in range(4):
            objective.hvp(torch.ones(18))
    assert evaluations == (1 if batches == 1 else 15)


def loss_of_another(model: nn.Module, batch: Any) -> Tensor:
    return mlp(5, 3)(batch[0]).sum()


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (loss_of_another, r"depends on none of the 2 measured\. Use the model it is called with"),
        (lambda m, b: m(b[0]), r"must return a scalar tensor, got shape \(9, 3\).*loss\.mean\(\)"),
        (lambda m, b: m(b[0]).sum().item(), r"must return a scalar tensor, got float .*\.item\(\)"),
        (lambda m, b: None, "must return a scalar tensor, got NoneType None"),
        (lambda m, b: m(b[0]).sum().detach(), "got a tensor without a graph. Don't detach"),
    ],
)
def test_a_loss_of_no_use_is_refused_with_what_to_do(loss_fn: Callable[..., Any], message: str):
    with (
        pytest.raises(UsageError, match=message),
        Objective(mlp(5, 3), loss_fn, [toy_batch()]) as objective,
    ):
        objective.loss()


def test_a_failure_that_is_not_about_devices_is_not_blamed_on_them():
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB. GPU 0 is full")

    elsewhere = torch.ones(9, 5, device="meta")  # loss_fn would move it
    with (
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
        Objective(mlp(5, 3), loss_fn, [elsewhere]) as objective,
    ):
        objective.loss()


def test_the_quadratics_spectrum_is_the_matrixs():
    matrix = wishart(9, seed=1)
    batch = torch.ones(1, dtype=torch.float64)
    assert torch.allclose(hessian_of(Quadratic(matrix), quadratic_loss, [batch]), matrix)
