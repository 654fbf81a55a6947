"""Every quantity against a closed form, and every wrong use against its message."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from faces import faced
from problems import Quadratic, cross_entropy, dense_hessian, digits, mlp, quadratic_loss, wishart
from scipy import stats
from torch import Tensor, nn

import geomwatch
from geomwatch.curvature.agreement import Validation
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.estimators.hutchinson import hutchinson, mean_with_stderr
from geomwatch.quantities.probe import Probe
from geomwatch.stability.problem import stability_of
from geomwatch.stability.scale_invariance import ScaleInvariance
from geomwatch.vectors.layout import Layout

ONE = torch.ones(1, dtype=torch.float64)
SGD = torch.optim.SGD


def diagonal(*eigenvalues: float) -> Quadratic:
    return Quadratic(torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)))


def toy_batch(count: int = 9, width: int = 5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, width, generator=rng)
    return inputs, torch.randint(0, 3, (count,), generator=rng)


# --- closed forms ----------------------------------------------------------------------------


def test_the_spectrum_of_a_quadratic_is_that_of_its_matrix():
    matrix = wishart(12, seed=1) - 0.05 * torch.eye(12, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(matrix).flip(0)
    record = geomwatch.measure(
        Quadratic(matrix), quadratic_loss, ONE, how=geomwatch.Measurement(quantities="all")
    )
    for name, expected in [
        ("lambda_max", exact[0]),
        ("lambda_2", exact[1]),
        ("lambda_3", exact[2]),
        ("lambda_min", exact[-1]),
        ("spectral_gap", exact[0] - exact[1]),
    ]:
        estimate = record[name]
        assert estimate.value == pytest.approx(float(expected), rel=1e-8), name
        assert estimate.error_kind == "residual"
        assert estimate.error < 1e-6
        assert estimate.status == "ok"


def test_first_and_second_derivatives_along_the_gradient_have_closed_forms():
    model = diagonal(4.0, 1.0, 0.5)
    gradient = torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64)  # at w = (1, 1, 1)
    record = geomwatch.measure(model, quadratic_loss, ONE)
    assert record.loss == record["loss"].value == pytest.approx(2.75, rel=1e-12)
    assert record["grad_norm"].value == pytest.approx(float(gradient.norm()), rel=1e-12)
    sharpness = (4.0**3 + 1.0 + 0.5**3) / float(gradient @ gradient)
    assert record["batch_sharpness"].value == pytest.approx(sharpness, rel=1e-12)


def test_the_trace_of_a_diagonal_hessian_is_exact_for_any_sample():
    record = geomwatch.measure(
        diagonal(4.0, 1.0, 0.5),
        quadratic_loss,
        ONE,
        how=geomwatch.Measurement(quantities="all"),
        samples=3,
    )
    assert record["trace"].value == pytest.approx(5.5, rel=1e-12)
    assert record["trace_per_param"].value == pytest.approx(5.5 / 3, rel=1e-12)
    assert record["trace_squared"].value == pytest.approx(16 + 1 + 0.25, rel=1e-12)
    for name in ("trace", "trace_per_param", "trace_squared"):
        assert record[name].error == pytest.approx(0, abs=1e-12)
        assert record[name].error_kind == "stderr"
        assert record[name].hvps == 3


def test_the_error_of_the_trace_per_parameter_is_that_of_the_trace_per_parameter():
    model = Quadratic(wishart(10, seed=2))
    record = geomwatch.measure(model, quadratic_loss, ONE)
    assert record["trace"].error > 0
    assert record["trace_per_param"].value == pytest.approx(record["trace"].value / 10)
    assert record["trace_per_param"].error == pytest.approx(record["trace"].error / 10)


@pytest.mark.parametrize(
    ("options", "threshold"),
    [
        ({}, 2.0),
        ({"momentum": 0.9}, 2 * 1.9),
        ({"momentum": 0.5}, 2 * 1.5),
        ({"momentum": 0.9, "nesterov": True}, 2 * 1.9 / 2.8),
    ],
)
def test_the_margin_is_the_learning_rate_times_curvature_over_the_threshold(options, threshold):
    model, lr = diagonal(4.0, 1.0, 0.5), 0.3
    record = geomwatch.measure(
        model, quadratic_loss, ONE, optimizer=SGD(model.parameters(), lr=lr, **options)
    )
    assert record.lr == (lr,)
    assert record["stability_margin"].value == pytest.approx(lr * 4 / threshold, rel=1e-8)
    assert record["lambda_max"].value == pytest.approx(4, rel=1e-8)


def test_the_margin_says_when_gradient_descent_diverges():
    """The margin crosses 1 exactly where the iterates start to grow."""
    for lr in (0.49, 0.51):  # 2 / lambda = 0.5
        model = diagonal(4.0, 1.0)
        optimizer = SGD(model.parameters(), lr=lr)
        margin = geomwatch.measure(model, quadratic_loss, ONE, optimizer=optimizer)[
            "stability_margin"
        ].value
        for _ in range(200):
            optimizer.zero_grad()
            quadratic_loss(model, ONE).backward()
            optimizer.step()
        assert (margin > 1) == bool(model.w[0].abs() > 1)


def test_coupled_weight_decay_adds_to_the_curvature_of_the_margin_only():
    model = diagonal(4.0, 1.0, 0.5)
    optimizer = SGD(model.parameters(), lr=0.3, weight_decay=0.2)
    record = geomwatch.measure(model, quadratic_loss, ONE, optimizer=optimizer)
    assert record["stability_margin"].value == pytest.approx(0.3 * 4.2 / 2, rel=1e-8)
    assert record["lambda_max"].value == pytest.approx(4, rel=1e-8)


def test_a_record_says_what_it_has_cost_and_how_it_was_made(monkeypatch):
    calls = 0
    monkeypatch.setattr(
        "geomwatch.curvature.validation.validate", lambda *_, **__: Validation(True, 0.0)
    )

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return quadratic_loss(model, batch)

    model = Quadratic(wishart(40, seed=3))
    names = ["loss", "grad_norm", "lambda_max", "batch_sharpness", "trace", "trace_per_param"]
    record = geomwatch.measure(
        model, loss_fn, ONE, how=geomwatch.Measurement(quantities=names), max_hvps=10, samples=5
    )
    assert record["lambda_max"].hvps <= 10
    assert record.provenance["hvps"] == record["lambda_max"].hvps + 5 + 1
    assert record.provenance["dtype"] == "float64"
    assert record.provenance["mode"] == "train"
    assert calls == 2 + 1  # to see what the loss changes; then one graph serves all


def test_one_seed_gives_one_result():
    model = Quadratic(wishart(40, seed=3))

    def traces(seed: int) -> float:
        return geomwatch.measure(model, quadratic_loss, ONE, how=geomwatch.Measurement(seed=seed))[
            "trace"
        ].value

    assert traces(1) == traces(1) != traces(2)


def test_a_chosen_block_of_parameters_has_its_own_spectrum():
    model, batch = mlp(5, 4, 3, activation=nn.Tanh).double(), toy_batch()
    batch = batch[0].double(), batch[1]
    block = dense_hessian(model, batch)[:24, :24]
    record = geomwatch.measure(
        model, cross_entropy, batch, how=geomwatch.Measurement(params="0.*"), max_hvps=24
    )
    exact = float(torch.linalg.eigvalsh(block)[-1])
    assert record["lambda_max"].value == pytest.approx(exact, rel=1e-6)
    assert record["trace_per_param"].value == pytest.approx(record["trace"].value / 24)


def test_the_first_quantities_of_a_real_net_are_those_of_its_dense_hessian():
    model, batch = mlp(64, 6, 10, activation=nn.Tanh), digits(256)
    exact = dense_hessian(model.double(), batch)
    model.float()
    names = ["lambda_max", "lambda_min", "trace", "trace_squared"]
    record = geomwatch.measure(
        model,
        cross_entropy,
        batch,
        how=geomwatch.Measurement(quantities=names),
        max_hvps=60,
        samples=40,
    )
    eigenvalues = torch.linalg.eigvalsh(exact)
    assert record["lambda_max"].value == pytest.approx(float(eigenvalues[-1]), rel=1e-3)
    assert record["lambda_min"].value == pytest.approx(float(eigenvalues[0]), rel=0.05)
    for name, expected in [("trace", exact.trace()), ("trace_squared", exact.square().sum())]:
        estimate = record[name]
        assert abs(estimate.value - float(expected)) < 4 * estimate.error


# --- the statistics of the trace -------------------------------------------------------------


@pytest.fixture(scope="module")
def small_net_hessian() -> Tensor:
    torch.manual_seed(0)
    return dense_hessian(mlp(64, 4, 10, activation=nn.Tanh).double(), digits(256))


@pytest.mark.parametrize("samples", [4, 6, 8, 10])
def test_the_students_t_interval_of_the_trace_covers_it(small_net_hessian, samples):
    hessian = small_net_hessian
    layout = Layout.of(Quadratic(hessian))
    exact = float(hessian.trace())
    quantile = stats.t.ppf(0.975, samples - 1)
    covered, values, errors = 0, [], []
    for seed in range(200):
        rng = torch.Generator().manual_seed(seed)
        drawn = hutchinson(lambda v: hessian @ v, layout, samples=samples, rng=rng)
        estimate = mean_with_stderr(drawn.quadratic, hvps=samples)
        covered += abs(estimate.value - exact) <= quantile * estimate.error
        values.append(estimate.value)
        errors.append(estimate.error)
    assert covered >= 0.85 * 200
    # and it is no wider than it has to be
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(values), rel=0.25)


def test_trace_and_trace_of_the_square_are_unbiased(small_net_hessian):
    hessian = small_net_hessian
    layout = Layout.of(Quadratic(hessian))
    rng = torch.Generator().manual_seed(0)
    drawn = hutchinson(lambda v: hessian @ v, layout, samples=2000, rng=rng)
    for values, exact in [
        (drawn.quadratic, hessian.trace()),
        (drawn.squared, hessian.square().sum()),
    ]:
        estimate = mean_with_stderr(values, hvps=0)
        assert 0 < estimate.error < 0.05 * float(exact)
        assert abs(estimate.value - float(exact)) < 4 * estimate.error


def test_the_variance_of_a_trace_sample_is_twice_the_off_diagonal_square(small_net_hessian):
    hessian = small_net_hessian
    rng = torch.Generator().manual_seed(1)
    drawn = hutchinson(lambda v: hessian @ v, Layout.of(Quadratic(hessian)), samples=4000, rng=rng)
    off_diagonal = hessian - torch.diag(hessian.diagonal())
    expected = 2 * float(off_diagonal.square().sum())
    assert statistics.variance(drawn.quadratic) == pytest.approx(expected, rel=0.15)


def test_one_sample_is_refused_because_it_has_no_error_bar():
    record = geomwatch.measure(diagonal(4.0, 1.0), quadratic_loss, ONE, samples=1)
    assert record["trace"].value is None
    assert "samples must be >= 2 to give a standard error, got 1" in record["trace"].reason
    assert record["lambda_max"].value == pytest.approx(4)


# --- numbers that can't be had ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_gives_a_reason_for_every_quantity(bad):
    model = diagonal(4.0, 1.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    record = geomwatch.measure(
        model,
        quadratic_loss,
        ONE * bad,
        how=geomwatch.Measurement(quantities="all"),
        optimizer=optimizer,
    )
    assert {"lambda_max", "trace", "stability_margin", "loss"} <= set(record)
    for name in record:
        assert record[name].value is None
        assert "not finite" in record[name].reason
    assert set(record.scalars()) == {"geom/probe_seconds"}


class OnceDifferentiable(torch.autograd.Function):
    """Cubes; torch.autograd.grad takes its gradient for a constant without saying so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


def cubed(model: nn.Module, batch: Tensor) -> Tensor:
    return OnceDifferentiable.apply(model.w).sum()


def cubed_and_more(model: nn.Module, batch: Tensor) -> Tensor:
    return (OnceDifferentiable.apply(model.w) * model.w).sum()


def ctc(model: nn.Module, batch: Tensor) -> Tensor:
    logits = (model.w * torch.arange(24.0, dtype=torch.float64).view(12, 2)).log_softmax(1)
    return F.ctc_loss(logits, torch.tensor([1, 1]), (12,), (2,))


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (cubed, "OnceDifferentiable in the loss has no second derivative"),
        (cubed_and_more, "OnceDifferentiable in the loss has no second derivative"),
        (ctc, "_ctc_loss_backward is not implemented"),
    ],
)
def test_a_quantity_that_fails_says_why_and_leaves_the_others_alone(loss_fn, reason):
    record = geomwatch.measure(
        diagonal(1.0, 2.0), loss_fn, ONE, how=geomwatch.Measurement(hvp="double_backward")
    )
    for name in ("lambda_max", "trace", "effective_rank"):
        assert record[name].value is None
        assert record[name].status == "failed"
        assert reason in record[name].reason
    assert record["loss"].value == record.loss
    assert record["grad_norm"].value > 0


def test_a_quantity_of_a_larger_model_is_withheld_from_a_small_one():
    record = geomwatch.measure(
        diagonal(4.0), quadratic_loss, ONE, how=geomwatch.Measurement(quantities="all")
    )
    assert record["lambda_max"].value == pytest.approx(4)
    for name in ("lambda_2", "lambda_3", "spectral_gap"):
        assert record[name].value is None
        assert "too few parameters" in record[name].reason


def test_difficulty_is_a_matter_of_a_whole_run():
    model = diagonal(4.0, 1.0)
    optimizer = SGD(model.parameters(), lr=0.1)
    record = geomwatch.measure(model, quadratic_loss, ONE, optimizer=optimizer)
    assert record["difficulty"].value is None
    assert "a Monitor keeps it" in record["difficulty"].reason


def test_what_needs_an_optimizer_is_left_out_without_one():
    names = set(geomwatch.measure(diagonal(4.0, 1.0), quadratic_loss, ONE))
    assert "lambda_max" in names
    assert not names & {"stability_margin", "stochastic_margin", "difficulty"}


def test_quantities_are_asked_for_by_name_in_place_of_those_of_how():
    how = geomwatch.Measurement(quantities="trace", seed=3)
    record = geomwatch.measure(
        diagonal(4.0, 1.0), quadratic_loss, ONE, how=how, quantities=["lambda_max"]
    )
    assert list(record) == ["lambda_max"]
    with pytest.raises(geomwatch.UsageError, match="lambda_mx"):
        geomwatch.measure(diagonal(4.0), quadratic_loss, ONE, quantities="lambda_mx")


# --- wrong use -------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [geomwatch.measure, geomwatch.doctor])
def test_the_line_to_write_for_an_old_option_can_be_written(entry):
    message = r"Write:\n    \w+\(model, loss_fn, batch, how=Measurement\(micro_batch=2\)\)"
    with pytest.raises(geomwatch.UsageError, match=message) as caught:
        entry(mlp(5, 3), cross_entropy, toy_batch(), micro_batch=2)
    scope = {"model": mlp(5, 3), "loss_fn": cross_entropy, "batch": toy_batch()}
    exec(str(caught.value).partition("Write:\n")[2].strip(), vars(geomwatch) | scope)


def measure(model: Any = None, loss_fn: Any = cross_entropy, batch: Any = None, **options: Any):
    return geomwatch.measure(
        mlp(5, 3) if model is None else model,
        loss_fn,
        toy_batch() if batch is None else batch,
        **faced(options),
    )


def monitor(model: Any = None, loss_fn: Any = cross_entropy, batch: Any = None, **options: Any):
    """A monitor at its first step."""
    model = mlp(5, 3) if model is None else model
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else [torch.ones(1)]
    watch = geomwatch.Monitor(model, loss_fn, SGD(parameters, lr=0.1), **faced(options))
    for p in parameters:
        p.grad = torch.ones_like(p)
    return watch.step(toy_batch() if batch is None else batch)


def elsewhere() -> tuple[Tensor, Tensor]:
    return tuple(t.to("meta") for t in toy_batch())


def nothing_to_train() -> nn.Module:
    return mlp(5, 3).requires_grad_(False)


BOTH = [measure, monitor]
MISTAKES: list[tuple[list[Callable[..., Any]], dict[str, Any], type[Exception], str]] = [
    ([monitor], {"every": 0}, ValueError, r"every must be an integer >= 1, got 0\. .*leave it out"),
    ([monitor], {"every": 1.5}, ValueError, r"every must be an integer >= 1, got 1\.5\. "),
    ([monitor], {"every": True}, ValueError, r"every must be an integer >= 1, got True\. "),
    ([monitor], {"budget": -1}, ValueError, r"share of training .*such as 0\.05 .*got -1"),
    ([monitor], {"budget": 5}, ValueError, r"got 5\. .*\n    budget=0\.05"),
    (
        [monitor],
        {"schedule": "often"},
        ValueError,
        r"Write:\n    Monitor\(model, loss_fn, optimizer, budget=0\.02\)",
    ),
    (
        [monitor],
        {"max_overhead": 0.05},
        ValueError,
        r"got max_overhead=0\.05\. Write:\n    Monitor\(model, loss_fn, optimizer, budget=0\.05\)",
    ),
    (
        BOTH,
        {"loss_fn": lambda m, b: m(b[0])[:, 0]},
        ValueError,
        r"scalar tensor, got shape \(9,\)\. Reduce it .*loss\.mean\(\)",
    ),
    (
        BOTH,
        {"loss_fn": lambda m, b: m(b[0]).sum().item()},
        TypeError,
        r"scalar tensor, got float .*without \.item\(\) or float\(\)",
    ),
    (
        BOTH,
        {"loss_fn": lambda m, b: m(b[0]).sum().detach()},
        ValueError,
        r"got a tensor without a graph\. Don't detach it",
    ),
    (
        BOTH,
        {"batch": elsewhere()},
        ValueError,
        r"batch must be on the model's device cpu, got tensors on meta\. Move the batch",
    ),
    (
        BOTH,
        {"model": nothing_to_train()},
        ValueError,
        r"at least one parameter with requires_grad=True, got none of 2 parameters\. Unfreeze",
    ),
    (
        BOTH,
        {"quantities": ["lambda_max", "sharpnes"]},
        ValueError,
        r"list of known names, got 'sharpnes'\..* Known: loss, .*lambda_max",
    ),
    (
        [measure],
        {"quantities": "stability_margin"},
        ValueError,
        r"'stability_margin' needs optimizer=, got None\. Pass the optimizer",
    ),
    (
        BOTH,
        {"params": "encoder.*"},
        ValueError,
        r"at least one trainable parameter, got 'encoder\.\*'\. The names are: 0\.weight, 0\.bias",
    ),
    (BOTH, {"params": []}, ValueError, r"at least one trainable parameter, got \[\]"),
    (BOTH, {"model": lambda x: x}, ValueError, r"model must be a torch\.nn\.Module, got function"),
    (BOTH, {"loss_fn": "mse"}, ValueError, r"loss_fn must be callable .*got str"),
    (BOTH, {"mode": "test"}, ValueError, r"mode must be \"train\" or \"eval\", got 'test'"),
]


@pytest.mark.parametrize(
    ("call", "options", "kind", "message"),
    [(call, *rest) for calls, *rest in MISTAKES for call in calls],
)
def test_a_mistake_is_answered_with_what_was_given_and_what_to_do(call, options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        call(**options)
    assert isinstance(caught.value, geomwatch.UsageError)


def test_a_step_after_the_optimizers_is_refused_with_the_right_place():
    model, batch = mlp(5, 3), toy_batch()
    optimizer = SGD(model.parameters(), lr=0.1)
    watch = geomwatch.Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, batch).backward()
    optimizer.step()
    message = r"must come before optimizer\.step\(\), got a gradient .*after loss\.backward\(\)"
    with pytest.raises(geomwatch.UsageError, match=message):
        watch.step(batch)


def test_a_step_without_a_gradient_is_refused_with_the_right_place():
    model, batch = mlp(5, 3), toy_batch()
    watch = geomwatch.Monitor(model, cross_entropy, SGD(model.parameters(), lr=0.1))
    message = r"must find gradients, got none\. Call .*after loss\.backward\(\) and before"
    with pytest.raises(geomwatch.UsageError, match=message):
        watch.step(batch)
    cross_entropy(model, batch).backward()
    assert watch.step(batch)["lambda_max"].value > 0  # the right place, found


def test_a_step_without_a_batch_is_refused_with_the_ways_to_give_one():
    model, batch = mlp(5, 3), toy_batch()
    watch = geomwatch.Monitor(model, cross_entropy, SGD(model.parameters(), lr=0.1))
    cross_entropy(model, batch).backward()
    message = r"must know the batch, got none\. Pass it as step\(batch\), call observe\(batch\)"
    with pytest.raises(geomwatch.UsageError, match=message):
        watch.step()
    watch.observe(batch)
    assert watch.step()["lambda_max"].value > 0


# --- weights whose scale the loss does not see -----------------------------------------------


class Normalized(nn.Module):
    """Convolutions before BatchNorms, of both kinds, and a final linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.up = nn.ConvTranspose1d(4, 3, 2, bias=False)
        self.up_norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(15, 3)
        for module in (self.norm, self.up_norm):  # their eps would break the invariance a little
            module.eps = 1e-12

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.conv(x.unsqueeze(1))))
        return self.head(torch.tanh(self.up_norm(self.up(hidden))).flatten(1))


INVARIANT = frozenset({"conv.weight", "up.weight"})


def invariant_names(
    model: nn.Module, batch: Any, memory: ScaleInvariance | None = None
) -> frozenset[str]:
    with Objective(model, cross_entropy, [batch]) as objective:
        return (memory or ScaleInvariance()).update(objective.layout, objective.gradient())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_before_a_batchnorm_are_invariant_and_a_final_layer_is_not(dtype):
    model, (inputs, labels) = Normalized().to(dtype), toy_batch(width=6)
    assert invariant_names(model, (inputs.to(dtype), labels)) == INVARIANT


def test_in_eval_mode_the_statistics_are_fixed_and_nothing_is_invariant():
    model, batch = Normalized(), toy_batch(width=6)
    model(batch[0])
    assert invariant_names(model.eval().double(), (batch[0].double(), batch[1])) >= INVARIANT
    with Objective(model, cross_entropy, [batch_of(batch)], how=Settings(mode="eval")) as objective:
        assert not ScaleInvariance().update(objective.layout, objective.gradient())


def batch_of(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].double(), batch[1]


def test_a_large_plain_matrix_is_not_invariant_by_chance():
    model = nn.Linear(1000, 1000, bias=False)
    layout = Layout.of(model)
    whole = []
    for seed in range(1, 6):  # not 0, from which the weights themselves were drawn
        gradient = layout.normal(torch.Generator().manual_seed(seed))
        whole.append(F.cosine_similarity(gradient, layout.values(), dim=0).abs().item())
        assert not ScaleInvariance().update(layout, gradient)
    assert statistics.median(whole) < 1e-3  # what a test on the whole matrix would see


def test_a_matrix_that_starts_at_zero_is_decided_by_its_second_gradient():
    model, batch, memory = mlp(5, 8, 3, activation=nn.Tanh), toy_batch(), ScaleInvariance()
    nn.init.zeros_(model[2].weight)
    optimizer = SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        assert not invariant_names(model, batch, memory)
        optimizer.zero_grad()
        cross_entropy(model, batch).backward()
        optimizer.step()
    assert set(memory.state_dict()["failed"]) == {"0.weight", "2.weight"}


def test_a_weight_without_a_gradient_is_not_condemned_for_good():
    """The last BatchNorm of a residual branch often starts at zero: nothing reaches the branch."""
    model, batch, memory = Normalized(), toy_batch(width=6), ScaleInvariance()
    nn.init.zeros_(model.up_norm.weight)
    assert not invariant_names(model, batch, memory)
    nn.init.ones_(model.up_norm.weight)
    assert invariant_names(model, batch, memory) == INVARIANT


def test_a_gradient_that_is_not_finite_condemns_nothing():
    model, batch, memory = Normalized(), toy_batch(width=6), ScaleInvariance()
    layout = Layout.of(model)
    assert not memory.update(layout, torch.full((layout.dim,), math.nan))
    assert invariant_names(model, batch, memory) == INVARIANT


def test_a_tensor_that_has_failed_once_stays_out_across_a_checkpoint():
    model, batch, memory = Normalized(), toy_batch(width=6), ScaleInvariance()
    layout = Layout.of(model)
    memory.update(layout, layout.values())  # g = w: the opposite of invariant
    resumed = ScaleInvariance()
    resumed.load_state_dict(memory.state_dict())
    assert not invariant_names(model, batch, resumed)


def test_the_margin_leaves_invariant_weights_out_and_lambda_max_keeps_them():
    model, batch = Normalized().double(), batch_of(toy_batch(width=6))
    with torch.no_grad():
        model.conv.weight.mul_(0.1)  # a small norm makes for a large, harmless curvature
    optimizer = SGD(model.parameters(), lr=0.3)
    with Objective(model, cross_entropy, [batch]) as objective:
        layout = objective.layout
        hessian = torch.stack([objective.hvp(e) for e in torch.eye(layout.dim).double()])
        stability = stability_of(
            optimizer, layout, gradient=objective.gradient(), exclude=INVARIANT
        )
        top = Probe(objective, stability=stability).margin_spectrum.vectors[0]
    kept = layout.mask(INVARIANT).bool()
    seen = float(torch.linalg.eigvalsh(hessian[kept][:, kept])[-1])
    whole = float(torch.linalg.eigvalsh(hessian)[-1])
    assert whole > 2 * seen
    record = geomwatch.measure(model, cross_entropy, batch, optimizer=optimizer, max_hvps=60)
    assert record["stability_margin"].value == pytest.approx(0.3 * seen / 2, rel=1e-3)
    assert record["lambda_max"].value == pytest.approx(whole, rel=1e-3)
    mass = layout.mass_by_module(top)
    assert mass["conv"] + mass["up"] < 1e-6
    assert sum(mass.values()) == pytest.approx(1)
