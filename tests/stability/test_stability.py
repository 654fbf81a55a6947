"""The margin's denominator: thresholds and preconditioners against torch.optim itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geomwatch.stability.problem import learning_rates, stability_of, unwrap
from geomwatch.stability.recursion import Recursion
from geomwatch.stability.registry import is_adaptive
from geomwatch.stability.scaled import Stability
from geomwatch.vectors.layout import Layout

optim = torch.optim


@dataclass(frozen=True)
class Case:
    """An optimizer whose preconditioner is held still by restoring its state before each step."""

    name: str
    make: Callable[..., optim.Optimizer]
    frozen: dict[str, float] = field(default_factory=dict)
    cold: bool = True
    curvature: float = 3.0
    relative: dict[str, float] = field(default_factory=dict)  # state that is a multiple of lr


def case(name: str, cls: type, frozen: dict[str, float] | None = None, **options: Any) -> Case:
    extra = {k: options.pop(k) for k in ("cold", "curvature", "relative") if k in options}
    return Case(name, functools.partial(cls, foreach=False, **options), frozen or {}, **extra)


ADAM = {"step": 7.0, "exp_avg_sq": 0.3}
SETTLED = {"step": 1e6, "exp_avg_sq": 0.3}
CASES = [
    case("sgd", optim.SGD),
    case("heavy ball", optim.SGD, momentum=0.9),
    case("dampening", optim.SGD, momentum=0.9, dampening=0.5),
    case("nesterov", optim.SGD, momentum=0.9, nesterov=True),
    case("sgd with coupled decay", optim.SGD, momentum=0.5, weight_decay=0.7),
    case("sgd that maximizes", optim.SGD, momentum=0.9, maximize=True, curvature=-3.0),
    case("maximizes with decay", optim.SGD, weight_decay=0.5, maximize=True, curvature=-3.0),
    case("asgd", optim.ASGD, lambd=0.8, weight_decay=0.2, relative={"eta": 0.9}),
    case("adam settled", optim.Adam, SETTLED, cold=False),
    case("adam cold", optim.Adam, ADAM),
    case("adam with a large eps", optim.Adam, ADAM, betas=(0.5, 0.9), eps=0.7),
    case("adam with coupled decay", optim.Adam, ADAM, weight_decay=0.6),
    case(
        "adam with decoupled decay", optim.Adam, ADAM, weight_decay=0.6, decoupled_weight_decay=True
    ),
    case("adamw settled", optim.AdamW, SETTLED, cold=False, weight_decay=0.6),
    case("adamw cold, maximizes", optim.AdamW, ADAM, maximize=True, curvature=-3.0),
    case("amsgrad", optim.Adam, ADAM | {"max_exp_avg_sq": 0.9}, amsgrad=True),
    case("nadam cold", optim.NAdam, ADAM | {"mu_product": 0.2}),
    case(
        "nadam at step 50",
        optim.NAdam,
        {"step": 50, "exp_avg_sq": 0.3, "mu_product": 0},
    ),
    case("nadam settled", optim.NAdam, SETTLED | {"mu_product": 0.0}, cold=False),
    case("nadam with constant mu", optim.NAdam, ADAM | {"mu_product": 0.1}, momentum_decay=0.0),
    case(
        "nadam with decoupled decay",
        optim.NAdam,
        ADAM | {"mu_product": 0.1},
        weight_decay=0.6,
        decoupled_weight_decay=True,
    ),
    case("radam before rectification", optim.RAdam, {"step": 2.0, "exp_avg_sq": 0.3}),
    case("radam rectified", optim.RAdam, {"step": 300.0, "exp_avg_sq": 0.3}),
    case("radam with decay", optim.RAdam, SETTLED, weight_decay=0.6, decoupled_weight_decay=True),
    case("adamax", optim.Adamax, {"step": 7.0, "exp_inf": 0.5}),
    case("adamax settled", optim.Adamax, {"step": 1e6, "exp_inf": 0.5}, cold=False),
    case("rmsprop", optim.RMSprop, {"square_avg": 0.3}),
    case("rmsprop with momentum", optim.RMSprop, {"square_avg": 0.3}, momentum=0.9),
    case("rmsprop centered", optim.RMSprop, {"square_avg": 0.3, "grad_avg": 0.4}, centered=True),
    case("adagrad", optim.Adagrad, {"sum": 0.3, "step": 40.0}, lr_decay=0.01, weight_decay=0.3),
    case("adadelta", optim.Adadelta, {"square_avg": 0.3, "acc_delta": 0.05}),
]


def begin(case: Case, lr: float, start: float = 1e-9) -> tuple[Tensor, optim.Optimizer]:
    """One weight and its optimizer, whose state exists and whose buffers are empty."""
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = case.make([w], lr=lr)
    w.grad = torch.zeros_like(w)
    optimizer.step()
    w.data.fill_(start)
    return w, optimizer


def freeze(case: Case, optimizer: optim.Optimizer, w: Tensor, lr: float) -> None:
    for key, value in (case.frozen | {k: v * lr for k, v in case.relative.items()}).items():
        optimizer.state[w][key].fill_(value)
    w.grad = case.curvature * w.detach()


def diverges(case: Case, lr: float, steps: int = 300, window: int = 50) -> bool:
    """Whether torch's own steps on curvature/2 w^2 grow, late enough for one mode to be left."""
    start = 1e-9
    w, optimizer = begin(case, lr, start)
    peaks = [0.0] * (steps // window)
    for step in range(steps):
        freeze(case, optimizer, w, lr)
        optimizer.step()
        size = abs(w.item())
        if size > 1e4 * start:
            return True
        peaks[step // window] = max(peaks[step // window], size)
    return peaks[-1] > peaks[-2]


def bisected_lr(case: Case) -> float:
    low, high = 1e-3, 1e3
    for _ in range(17):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if diverges(case, middle) else (middle, high)
    return math.sqrt(low * high)


def margin(problem: Stability, curvature: float) -> float:
    return problem.apply(lambda v: curvature * v)(torch.ones_like(problem.scale)).item()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_threshold_agrees_with_bisection_on_torch_optim(case: Case) -> None:
    lr = bisected_lr(case)
    w, optimizer = begin(case, lr)
    freeze(case, optimizer, w, lr)
    problem = stability_of(optimizer, Layout(("w",), (w,)), damping="none", cold_start=case.cold)
    assert problem.status == "ok"
    assert margin(problem, case.curvature) == pytest.approx(1, rel=1e-3)


def test_the_cold_start_correction_is_left_out_of_the_warning_margin() -> None:
    adam = next(c for c in CASES if c.name == "adam cold")
    w, optimizer = begin(adam, 0.1)
    freeze(adam, optimizer, w, 0.1)
    layout = Layout(("w",), (w,))
    cold = margin(stability_of(optimizer, layout, cold_start=True), 3.0)
    assert margin(stability_of(optimizer, layout), 3.0) == pytest.approx(cold * (1 - 0.9**8))


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def backward(model: nn.Module, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    x = torch.randn(8, 4, generator=rng).to(dtype)
    model.zero_grad()
    model(x).square().mean().backward()
    return Layout.of(model).flatten([p.grad for p in model.parameters()])


def averages(optimizer: optim.Optimizer, layout: Layout, key: str) -> Tensor:
    return layout.flatten([optimizer.state[p][key] for p in layout.params])


def averaged_move(optimizer: optim.Optimizer, layout: Layout, **_: Any) -> Tensor:
    return averages(optimizer, layout, "exp_avg")


def nadam_move(optimizer: optim.Optimizer, layout: Layout, used: Tensor, step: int) -> Tensor:
    group = optimizer.param_groups[0]
    b1, decay = group["betas"][0], group["momentum_decay"]
    mus = [b1 * (1 - 0.5 * 0.96 ** (t * decay)) for t in range(1, step + 2)]
    direct = (1 - mus[-2]) / (1 - math.prod(mus[:-1]))
    through = mus[-1] / (1 - math.prod(mus))
    move = direct * used + through * averages(optimizer, layout, "exp_avg")
    return move / (direct + through)


def radam_move(optimizer: optim.Optimizer, layout: Layout, used: Tensor, step: int) -> Tensor:
    b2 = optimizer.param_groups[0]["betas"][1]
    longest = 2 / (1 - b2) - 1
    n = longest - 2 * step * b2**step / (1 - b2**step)
    rate = (n - 4) * (n - 2) * longest / ((longest - 4) * (longest - 2) * n) if n > 5 else 1
    return math.sqrt(rate) * averages(optimizer, layout, "exp_avg")


def plain_move(optimizer: optim.Optimizer, layout: Layout, used: Tensor, step: int) -> Tensor:
    return used / (1 + (step - 1) * optimizer.param_groups[0].get("lr_decay", 0.0))


EXACT = {
    "adam": (optim.Adam, {}, averaged_move),
    "adam with decay": (optim.Adam, {"weight_decay": 0.1}, averaged_move),
    "adam that maximizes": (optim.Adam, {"weight_decay": 0.1, "maximize": True}, averaged_move),
    "amsgrad": (optim.Adam, {"amsgrad": True, "betas": (0.9, 0.5)}, averaged_move),
    "adamw": (optim.AdamW, {"weight_decay": 0.1}, averaged_move),
    "adamax": (optim.Adamax, {"weight_decay": 0.1, "betas": (0.9, 0.5)}, averaged_move),
    "nadam": (optim.NAdam, {}, nadam_move),
    "nadam decoupled": (
        optim.NAdam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
        nadam_move,
    ),
    "radam": (optim.RAdam, {"betas": (0.9, 0.9)}, radam_move),
    "rmsprop": (optim.RMSprop, {"weight_decay": 0.1}, plain_move),
    "rmsprop centered": (optim.RMSprop, {"centered": True, "maximize": True}, plain_move),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.01}, plain_move),
    "adadelta": (optim.Adadelta, {"weight_decay": 0.1}, plain_move),
}


@pytest.fixture
def wide_scalars() -> Iterator[None]:
    """Let torch keep its scalar state (NAdam's product of momenta) in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("wide_scalars")
@pytest.mark.parametrize("how", ["foreach", "one by one", "tensor lr"])
@pytest.mark.parametrize("name", EXACT)
def test_the_preconditioner_is_the_one_the_coming_step_uses(name: str, how: str) -> None:
    cls, options, move = EXACT[name]
    model = net()
    layout = Layout.of(model)
    lr = torch.tensor(0.01, dtype=torch.float64) if how == "tensor lr" else 0.01
    optimizer = cls(model.parameters(), lr=lr, foreach=how == "foreach", **options)
    for step in range(1, 8):
        g = backward(model, seed=step)
        before = layout.values()
        problem = stability_of(optimizer, layout, damping="none", cold_start=True)
        used = problem.sign * g
        if problem.decay is not None:
            used = used + problem.decay * before
        optimizer.step()
        decoupled = 0.01 * 0.1 if problem.decay is None and "weight_decay" in options else 0.0
        predicted = (
            -0.01 * problem.inverse_preconditioner * move(optimizer, layout, used=used, step=step)
        )
        moved = layout.values() - (1 - decoupled) * before
        torch.testing.assert_close(moved, predicted, rtol=1e-10, atol=1e-13)


def test_the_buffer_of_rmsprop_takes_in_the_preconditioned_gradient() -> None:
    model = net()
    layout = Layout.of(model)
    optimizer = optim.RMSprop(model.parameters(), momentum=0.9)
    for step in range(3):
        g = backward(model, seed=step)
        problem = stability_of(optimizer, layout, damping="none", cold_start=True)
        old = averages(optimizer, layout, "momentum_buffer") if step else torch.zeros_like(g)
        optimizer.step()
        new = averages(optimizer, layout, "momentum_buffer") - 0.9 * old
        torch.testing.assert_close(new, problem.inverse_preconditioner * g, rtol=1e-10, atol=1e-13)


def test_a_given_gradient_counts_instead_of_that_of_the_parameters() -> None:
    model = net()
    layout = Layout.of(model)
    optimizer = optim.Adam(model.parameters())
    g = backward(model)
    own = stability_of(optimizer, layout)
    model.zero_grad()
    given = stability_of(optimizer, layout, gradient=g)
    torch.testing.assert_close(given.scale, own.scale, rtol=0, atol=0)


def test_narrow_state_gives_wide_vectors() -> None:
    model = net(torch.bfloat16)
    layout = Layout.of(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    for step in range(3):
        backward(model, seed=step)
        problem = stability_of(optimizer, layout)
        assert problem.scale.dtype == torch.float32
        assert bool(torch.isfinite(problem.scale).all())
        assert bool((problem.scale > 0).all())
        optimizer.step()


def test_each_group_has_its_own_rate_momentum_and_decay() -> None:
    model = net()
    layout = Layout.of(model)
    first, second = model[0], model[2]
    optimizer = optim.SGD(
        [
            {"params": first.parameters(), "lr": 0.1, "momentum": 0.9, "weight_decay": 0.3},
            {"params": second.parameters(), "lr": 0.02, "momentum": 0.0},
        ],
        lr=1.0,
    )
    backward(model)
    problem = stability_of(optimizer, layout)
    one = torch.arange(layout.dim) < sum(p.numel() for p in first.parameters())
    torch.testing.assert_close(problem.scale[one].square().unique().item(), 0.1 / 3.8)
    torch.testing.assert_close(problem.scale[~one].square().unique().item(), 0.02 / 2)
    assert problem.decay is not None
    assert torch.equal(problem.decay, 0.3 * one.double())
    assert problem.uniform is None
    assert problem.limit_ratio == pytest.approx(19)
    assert learning_rates(optimizer) == (0.1, 0.02)


def test_the_operator_is_what_its_formula_says() -> None:
    model = net()
    layout = Layout.of(model)
    optimizer = optim.Adam(model.parameters(), weight_decay=0.3, maximize=True)
    backward(model)
    problem = stability_of(optimizer, layout)
    rng = torch.Generator().manual_seed(1)
    half = torch.randn(layout.dim, layout.dim, generator=rng, dtype=torch.float64)
    hessian, y = half + half.T, layout.normal(rng)
    s = torch.diag(problem.scale)
    dense = s @ (-hessian + 0.3 * torch.eye(layout.dim, dtype=torch.float64)) @ s
    torch.testing.assert_close(problem.apply(lambda v: hessian @ v)(y), dense @ y)


def test_parameters_that_are_not_stepped_have_scale_zero() -> None:
    model = net()
    layout = Layout.of(model)
    optimizer = optim.Adam(list(model.parameters())[:3], weight_decay=0.1)
    backward(model)
    model[0].bias.grad = None
    problem = stability_of(optimizer, layout)
    stepped = layout.mask(["0.bias", "2.bias"])
    assert torch.equal((problem.scale > 0).double(), stepped)
    assert torch.equal((problem.inverse_preconditioner > 0).double(), stepped)
    assert problem.decay is not None
    assert torch.equal(problem.decay, 0.1 * stepped)


def test_excluded_parameters_have_scale_zero() -> None:
    model = net()
    layout = Layout.of(model)
    backward(model)
    problem = stability_of(optim.SGD(model.parameters(), lr=0.1), layout, exclude=["0.weight"])
    assert torch.equal((problem.scale > 0).double(), layout.mask(["0.weight"]))
    assert problem.uniform is None


def test_plain_sgd_is_uniform_and_others_are_not() -> None:
    model = net()
    layout = Layout.of(model)
    backward(model)
    sgd = stability_of(optim.SGD(model.parameters(), lr=0.1, momentum=0.9), layout)
    assert sgd.uniform == pytest.approx(math.sqrt(0.1 / 3.8))
    assert torch.equal(sgd.inverse_preconditioner, torch.ones(layout.dim, dtype=torch.float64))
    assert stability_of(optim.Adam(model.parameters()), layout).uniform is None
    assert stability_of(optim.SGD(list(model.parameters())[1:]), layout).uniform is None


def test_a_learning_rate_of_zero_gives_a_zero_scale_and_planned_rates_the_real_one() -> None:
    model = net()
    layout = Layout.of(model)
    backward(model)
    optimizer = optim.AdamW(model.parameters(), lr=0.0)
    now = stability_of(optimizer, layout)
    assert not now.scale.any()
    assert now.uniform is None
    assert bool((now.inverse_preconditioner > 0).all())
    peak = stability_of(optimizer, layout, rates=[0.01])
    optimizer.param_groups[0]["lr"] = 0.01
    torch.testing.assert_close(peak.scale, stability_of(optimizer, layout).scale, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [optim.Adam, optim.NAdam, optim.Adamax, optim.RMSprop])
def test_damping_takes_the_median_over_entries_that_have_seen_a_gradient(cls: type) -> None:
    w = torch.zeros(100, dtype=torch.float64, requires_grad=True)
    w.grad = torch.zeros_like(w)
    w.grad[:5] = torch.tensor([1e-6, 1.0, 2.0, 3.0, 4.0])
    optimizer, layout = cls([w]), Layout(("w",), (w,))
    raw = 1 / stability_of(optimizer, layout, damping="none").inverse_preconditioner
    damped = 1 / stability_of(optimizer, layout).inverse_preconditioner
    torch.testing.assert_close(damped, raw.clamp_min(raw[2].item()))


def test_damping_is_per_group() -> None:
    small, large = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    small.grad = torch.tensor([1e-4, 2e-4, 3e-4], dtype=torch.float64)
    large.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer = optim.Adam([{"params": [small]}, {"params": [large]}])
    layout = Layout(("small", "large"), (small, large))
    damped = 1 / stability_of(optimizer, layout).inverse_preconditioner
    expected = torch.tensor([2e-4, 2e-4, 3e-4, 2, 2, 3], dtype=torch.float64) + 1e-8
    torch.testing.assert_close(damped, expected)


def test_without_any_gradient_signal_damping_changes_nothing() -> None:
    w = torch.zeros(4, requires_grad=True)
    w.grad = torch.zeros_like(w)
    problem = stability_of(optim.Adam([w]), Layout(("w",), (w,)))
    torch.testing.assert_close(problem.inverse_preconditioner, torch.full((4,), 1e8))


def test_reading_leaves_the_optimizer_untouched() -> None:
    model = net()
    layout = Layout.of(model)
    backward(model)
    for cls in (optim.SGD, optim.Adam, optim.NAdam, optim.Rprop, optim.Adadelta):
        optimizer = cls(model.parameters(), lr=0.01)
        stability_of(optimizer, layout)
        assert len(optimizer.state) == 0
        optimizer.step()
        state = {
            key: value.clone()
            for p in layout.params
            for key, value in optimizer.state[p].items()
            if isinstance(value, Tensor)
        }
        weights = layout.values()
        stability_of(optimizer, layout)
        assert torch.equal(layout.values(), weights)
        last = optimizer.state[layout.params[-1]]
        assert all(torch.equal(last[key], value) for key, value in state.items())


class Inherits(optim.AdamW):
    pass


class Overrides(optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Alters(optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.sign_()
        return super().step(closure)


class Wrapper:
    """What a host puts around an optimizer: everything passes through."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def step(self) -> None:
        self.optimizer.step()


class Lookahead:
    """Another algorithm around an optimizer: it has slow weights of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        self.optimizer.step()


Ready = tuple[nn.Module, Layout]


@pytest.fixture
def ready() -> Ready:
    """A model after backward()."""
    model = net()
    backward(model)
    return model, Layout.of(model)


def test_a_subclass_that_keeps_step_is_known(ready: Ready) -> None:
    model, layout = ready
    problem = stability_of(Inherits(model.parameters()), layout)
    expected = stability_of(optim.AdamW(model.parameters()), layout)
    assert problem.status == "ok"
    assert torch.equal(problem.scale, expected.scale)


def test_a_subclass_whose_step_only_calls_its_parents_is_known(ready: Ready) -> None:
    model, layout = ready
    assert stability_of(Overrides(model.parameters(), lr=0.04), layout).status == "ok"


def test_a_subclass_that_steps_otherwise_is_unknown(ready: Ready) -> None:
    model, layout = ready
    problem = stability_of(Alters(model.parameters(), lr=0.04), layout)
    assert problem.status == "unknown"
    assert "no stability formula for Alters.step" in problem.reason
    assert problem.uniform == pytest.approx(0.2)
    assert problem.decay is None
    torch.testing.assert_close(problem.scale, torch.full_like(problem.scale, 0.2))


def test_wrappers_that_pass_through_are_looked_inside(ready: Ready) -> None:
    model, layout = ready
    inner = optim.Adam(model.parameters())
    outer = Wrapper(Wrapper(inner))
    assert unwrap(outer) is inner
    assert stability_of(outer, layout).status == "ok"
    assert learning_rates(outer) == (1e-3,)


def test_a_wrapper_with_its_own_state_is_another_algorithm(ready: Ready) -> None:
    model, layout = ready
    wrapper = Lookahead(optim.Adam(model.parameters()))
    assert unwrap(wrapper) is wrapper
    assert stability_of(wrapper, layout).status == "unknown"


def test_a_scheduler_that_patches_step_does_not_hide_it(ready: Ready) -> None:
    model, layout = ready
    optimizer = optim.Adam(model.parameters(), lr=0.1)
    optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert "step" in vars(optimizer)
    assert stability_of(optimizer, layout).status == "ok"
    assert learning_rates(optimizer) == (0.05,)


@pytest.mark.parametrize(
    ("cls", "status"), [(optim.Rprop, "directional"), (optim.LBFGS, "unknown")]
)
def test_an_optimizer_without_a_limit_says_so(cls: type, status: str, ready: Ready) -> None:
    model, layout = ready
    problem = stability_of(cls(model.parameters(), lr=0.25), layout)
    assert problem.status == status
    assert cls.__name__ in problem.reason
    assert "lr * lambda_max(H)" in problem.reason
    assert problem.uniform == pytest.approx(0.5)
    assert problem.limit_ratio == 1


def test_muon_is_directional() -> None:
    w = torch.ones(2, 3, requires_grad=True)
    w.grad = torch.ones_like(w)
    problem = stability_of(optim.Muon([w], lr=0.25), Layout(("w",), (w,)))
    assert problem.status == "directional"
    assert "constant size" in problem.reason
    assert problem.uniform == pytest.approx(0.5)


@pytest.mark.parametrize("optimizer", [None, object()])
def test_something_else_than_an_optimizer_is_unknown(optimizer: object, ready: Ready) -> None:
    _, layout = ready
    problem = stability_of(optimizer, layout)
    assert problem.status == "unknown"
    assert problem.uniform == 1
    assert learning_rates(optimizer) == ()


def test_a_custom_optimizer_without_a_number_for_its_rate_is_unknown(ready: Ready) -> None:
    class Relative(optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": None, "weight_decay": None})

        def step(self, closure: Any = None) -> None:
            return None

    model, layout = ready
    problem = stability_of(Relative(model.parameters()), layout)
    assert (problem.status, problem.uniform) == ("unknown", 1)


def test_an_optimizer_of_other_parameters_is_unknown(ready: Ready) -> None:
    _, layout = ready
    other = torch.zeros(3, requires_grad=True)
    problem = stability_of(optim.Adam([other], lr=0.25), layout)
    assert problem.status == "unknown"
    assert "steps none of the measured parameters" in problem.reason
    assert problem.uniform == pytest.approx(0.5)


def test_minimizing_beside_maximizing_is_unknown(ready: Ready) -> None:
    model, layout = ready
    groups = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "maximize": True},
    ]
    problem = stability_of(optim.SGD(groups, lr=0.1), layout)
    assert problem.status == "unknown"
    assert "symmetric" in problem.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda params: optim.SGD(params, lr=0.1, momentum=1.0),
        lambda params: optim.SGD(params, lr=0.1, momentum=0.9, dampening=1.5),
        lambda params: optim.AdamW(params, lr=1.0, weight_decay=2.5),
    ],
)
def test_settings_that_no_curvature_survives_are_unknown(make: Any, ready: Ready) -> None:
    model, layout = ready
    problem = stability_of(make(model.parameters()), layout)
    assert problem.status == "unknown"
    assert "no step is stable" in problem.reason
    assert bool(torch.isfinite(problem.scale).all())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda params: optim.SGD(params, lr=0.1), 1),
        (lambda params: optim.SGD(params, lr=0.1, momentum=0.9), 1.9 / 0.1),
        (lambda params: optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5), 1.9 / 0.1),
        (lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True), 19 / 2.8),
        (lambda params: optim.Adam(params), 19),
        (lambda params: optim.AdamW(params, lr=0.1, weight_decay=0.1), 19 * (1 - 0.005)),
        (lambda params: optim.RMSprop(params), 1),
    ],
)
def test_noise_ratio_is_the_ratio_of_the_two_thresholds(
    make: Any, expected: float, ready: Ready
) -> None:
    model, layout = ready
    assert stability_of(make(model.parameters()), layout).limit_ratio == pytest.approx(expected)


@pytest.mark.parametrize("cold_start", [False, True])
def test_the_small_batch_margin_of_adam_is_half_eta_times_batch_sharpness(
    cold_start: bool, ready: Ready
) -> None:
    model, layout = ready
    rng = torch.Generator().manual_seed(1)
    half = torch.randn(layout.dim, layout.dim, generator=rng, dtype=torch.float64)
    hessian, g = half @ half.T, layout.normal(rng)
    for cls in (optim.Adam, optim.NAdam, optim.Adamax):
        s = stability_of(cls(model.parameters(), lr=0.1), layout, cold_start=cold_start)
        d, p = s.scale**2 * g, s.inverse_preconditioner * g
        ours = s.limit_ratio * (d @ hessian @ d) / (g @ d)
        torch.testing.assert_close(ours, 0.1 / 2 * (p @ hessian @ p) / (g @ p))


@pytest.mark.parametrize(
    "recursion",
    [
        {},
        {"memory": 0.9, "intake": 1.0, "direct": 0.0, "through": 1.0},
        {"memory": 0.9, "intake": 0.5, "direct": 0.0, "through": 1.0},
        {"memory": 0.9, "intake": 1.0, "direct": 1.0, "through": 0.9},
        {"memory": 0.9, "intake": 0.1, "direct": 0.55, "through": 0.45},
    ],
)
def test_the_small_batch_threshold_is_that_of_rare_large_kicks(recursion: Any) -> None:
    step = Recursion(1.0, **recursion)
    full = {"memory": 0.0, "intake": 0.0, "direct": 1.0, "through": 0.0} | recursion
    b, k, a, c = full.values()

    def growth(batch_sharpness: float, chance: float = 1e-6) -> float:
        """Spectral radius of the second moments when one batch in a million has curvature."""
        total = np.zeros((4, 4))
        for h, weight in ((0.0, 1 - chance), (batch_sharpness, chance)):
            one = np.array([[1 - h * (a + c * k), -c * b], [k * h, b]])
            total += weight * np.kron(one, one)
        return max(abs(np.linalg.eigvals(total)))

    threshold = step.threshold / step.limit_ratio
    assert growth(0.99 * threshold) < 1 < growth(1.01 * threshold)


def test_no_gradient_is_refused(ready: Ready) -> None:
    model, layout = ready
    model.zero_grad()
    with pytest.raises(ValueError, match=r"gradient must be there .* got none on 4 parameters"):
        stability_of(optim.Adam(model.parameters()), layout)


def test_a_gradient_of_another_shape_is_refused(ready: Ready) -> None:
    model, layout = ready
    with pytest.raises(ValueError, match=r"gradient must have shape \(44,\), got \(3,\)"):
        stability_of(optim.Adam(model.parameters()), layout, gradient=torch.zeros(3))


def test_an_unknown_excluded_name_is_refused(ready: Ready) -> None:
    model, layout = ready
    with pytest.raises(ValueError, match=r"exclude must hold names .* got \['1.weight'\]"):
        stability_of(optim.Adam(model.parameters()), layout, exclude=["0.weight", "1.weight"])


def test_an_unknown_damping_is_refused(ready: Ready) -> None:
    model, layout = ready
    with pytest.raises(ValueError, match='damping must be "median" or "none", got \'mean\''):
        stability_of(optim.Adam(model.parameters()), layout, damping="mean")  # type: ignore[arg-type]


def test_a_wrong_number_of_rates_is_refused(ready: Ready) -> None:
    model, layout = ready
    with pytest.raises(ValueError, match=r"rates must have one entry for each of 1 .* got \(0.1, "):
        stability_of(optim.Adam(model.parameters()), layout, rates=[0.1, 0.2])


def test_adaptive_is_what_preconditions_its_steps():
    class Renamed(torch.optim.SGD):
        """A subclass that steps as SGD does."""

    weights = [torch.nn.Parameter(torch.zeros(2))]
    assert not is_adaptive(torch.optim.SGD(weights, lr=0.1))
    assert not is_adaptive(Renamed(weights, lr=0.1))
    assert not is_adaptive(torch.optim.ASGD(weights, lr=0.1))
    assert is_adaptive(torch.optim.AdamW(weights, lr=0.1))
    assert is_adaptive(torch.optim.RMSprop(weights, lr=0.1))
