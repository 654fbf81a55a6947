"""A probe leaves no trace: training with geomwatch on is bit for bit training without it."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import logging
import random
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faces import faced
from problems import cross_entropy, mlp
from states import assert_same, everything, same, seed
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import geomwatch
from geomwatch.curvature import batches
from geomwatch.curvature.objective import Objective
from geomwatch.curvature.settings import Settings
from geomwatch.isolation.isolation import captured_by
from geomwatch.isolation.snapshot import Snapshot

STEPS = 3


# --- training with and without ---------------------------------------------------------------


class Noise(nn.Module):
    """Draws from NumPy's and Python's global generators, as augmentations do."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * np.random.normal() + 0.1 * random.random())


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = cell(5, 6, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Attentive(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens).mean(1)))


def noisy_mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), Noise(), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def old_style(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(norm(nn.Linear(5, 8)), nn.Tanh(), norm(nn.Linear(8, 3)))


def frozen() -> nn.Module:
    model = mlp(5, 8, 8, 3)
    model[2].requires_grad_(False)
    return model


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


@dataclasses.dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (9, 5)
    tokens: int = 0  # the vocabulary of a net that reads tokens

    def batch(self) -> tuple[Tensor, Tensor]:
        reads = torch.randint(0, self.tokens, self.shape) if self.tokens else None
        return torch.randn(self.shape) if reads is None else reads, torch.randint(0, 3, (9,))


NETS = {
    "BatchNorm, dropout and other generators": Net(noisy_mlp),
    "spectral norm by hooks": Net(lambda: old_style(nn.utils.spectral_norm)),
    "weight norm by hooks": Net(lambda: old_style(nn.utils.weight_norm)),
    "spectral norm": Net(lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 3)))),
    "weight norm": Net(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 3)))),
    "LSTM": Net(lambda: Recurrent(nn.LSTM), (9, 4, 5)),
    "GRU": Net(lambda: Recurrent(nn.GRU), (9, 4, 5)),
    "TransformerEncoder": Net(Attentive, (9, 4, 8)),
    "tied embedding": Net(Tied, (9, 4), tokens=7),
    "frozen layer": Net(frozen),
    "convolution": Net(convolutional),
}
OPTIMIZERS = {
    "SGD with momentum": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-2, foreach=False),
    "Adam, foreach": functools.partial(torch.optim.Adam, lr=1e-2, foreach=True),
    "AdamW, amsgrad": functools.partial(torch.optim.AdamW, lr=1e-2, amsgrad=True),
}


def train(
    net: Net, make_optimizer: Callable[..., Any], *, watch: bool, quantities: Any = "all"
) -> tuple[dict[str, Any], list[geomwatch.Record]]:
    """Train for some steps from fixed seeds; return all that remains, and the records."""
    seed(1)
    model = net.make()
    optimizer = make_optimizer(model.parameters())
    monitor = None
    if watch:
        monitor = geomwatch.Monitor(
            model,
            cross_entropy,
            optimizer,
            how=geomwatch.Measurement(quantities=quantities),
            every=1,
        )
    calls: collections.Counter[str] = collections.Counter()
    hook_in(model, calls)
    losses = []
    for _ in range(STEPS):
        batch = net.batch()
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch)
        optimizer.step()
        losses.append(loss.item())
    remains = everything(model, optimizer) | {"losses": losses, "hook calls": dict(calls)}
    return remains, [] if monitor is None else monitor.history


def hook_in(model: nn.Module, calls: collections.Counter[str]) -> None:
    """Hooks of every kind; the forward hook steps aside in a probe, as is_probing() lets it."""

    def forward(*_: object) -> None:
        calls["forward"] += not geomwatch.is_probing()

    def count(kind: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[kind] += 1

        return hook

    last = list(model.modules())[-1]
    last.register_forward_hook(forward)
    last.register_full_backward_hook(count("module"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    trainable[0].register_hook(count("parameter"))
    trainable[0].register_hook(lambda gradient: 0.5 * gradient)
    trainable[-1].register_post_accumulate_grad_hook(count("accumulated"))


def assert_watching_changes_nothing(net: Net, make_optimizer: Callable[..., Any]) -> None:
    without, _ = train(net, make_optimizer, watch=False)
    with_it, records = train(net, make_optimizer, watch=True)
    assert_same(without, with_it)
    # It did measure: a probe that failed would leave no trace either.
    assert [r.step for r in records] == list(range(STEPS))
    assert all(r["lambda_max"].value > 0 and r.provenance["hvps"] >= 3 for r in records)


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_training_is_bit_identical_for_every_kind_of_net(net):
    assert_watching_changes_nothing(net, OPTIMIZERS["SGD with momentum"])


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_is_bit_identical_for_every_optimizer(make_optimizer):
    assert_watching_changes_nothing(NETS["BatchNorm, dropout and other generators"], make_optimizer)


def test_the_comparison_notices_a_probe_that_is_not_put_back(monkeypatch):
    monkeypatch.setattr(Snapshot, "finish", lambda self: None)
    monkeypatch.setattr(Snapshot, "restore", lambda self: None)
    net, optimizer = NETS["BatchNorm, dropout and other generators"], OPTIMIZERS["Adam"]
    without, _ = train(net, optimizer, watch=False)
    with_it, _ = train(net, optimizer, watch=True, quantities=["loss"])
    differing = {key for key in without if not same(without[key], with_it[key])}
    assert differing >= {"weights and buffers", "gradients", "optimizer", "rng", "losses"}


# --- probes that fail or are interrupted -----------------------------------------------------


def fails_at(evaluation: int, error: BaseException) -> Callable[[nn.Module, Any], Tensor]:
    """A loss_fn that raises at an evaluation of a probe, after the model has run."""
    seen = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        loss = cross_entropy(model, batch)
        if geomwatch.is_probing():
            seen += 1
            if seen == evaluation:
                seen = 0
                raise error
        return loss

    return loss_fn


@pytest.mark.parametrize("evaluation", [1, 2])
def test_training_is_bit_identical_when_every_probe_fails(evaluation, caplog):
    net = NETS["BatchNorm, dropout and other generators"]

    def run(watch: bool) -> tuple[dict[str, Any], geomwatch.Monitor]:
        seed(0)
        model = net.make()
        optimizer = torch.optim.Adam(model.parameters())
        loss_fn = fails_at(evaluation, OSError("the disk has gone"))
        monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for _ in range(2):
                batch = net.batch()
                monitor.observe(batch)
                (loss_fn(model, batch) / 2).backward()
            if watch:
                monitor.step()
            optimizer.step()
        return everything(model, optimizer), monitor

    with caplog.at_level(logging.WARNING, "geomwatch"):
        without, _ = run(watch=False)
        with_it, monitor = run(watch=True)
    assert_same(without, with_it)
    assert monitor.history == []
    assert [m for m in caplog.messages if "the disk has gone" in m]


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), MemoryError("stop")])
def test_an_error_passes_through_a_measurement_and_leaves_everything_as_it_was(evaluation, error):
    net = NETS["BatchNorm, dropout and other generators"]
    model = net.make()
    cross_entropy(model, net.batch()).backward()
    loss_fn = fails_at(evaluation, error)
    window = [net.batch(), net.batch()]
    before = everything(model)
    with pytest.raises(type(error), match="stop"), Objective(model, loss_fn, window) as objective:
        objective.gradient()
    assert_same(before, everything(model))
    assert not geomwatch.is_probing()


def test_an_interrupt_inside_a_monitors_probe_reaches_the_user():
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, fails_at(1, KeyboardInterrupt("stop")), optimizer)
    cross_entropy(model, batch).backward()
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        monitor.step(batch)
    assert_same(before, everything(model, optimizer))


# --- hooks -----------------------------------------------------------------------------------


def clip(gradient: Tensor) -> Tensor:
    return 10 * gradient.clamp(-1e-3, 1e-3)


def hessian_times(model: nn.Module, loss_fn: Any, batch: Any, v: Tensor) -> tuple[Tensor, Tensor]:
    with Objective(model, loss_fn, [batch]) as objective:
        return objective.gradient(), objective.hvp(v)


def test_hooks_do_not_bend_the_gradient_or_an_hvp():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    plain = hessian_times(model, cross_entropy, batch, v)
    for p in model.parameters():
        p.register_hook(clip)
        p.register_hook(lambda gradient: -gradient)
    model[1].register_full_backward_hook(lambda module, given, out: (clip(given[0]),))
    model[2].register_full_backward_pre_hook(lambda module, out: (clip(out[0]),))
    assert same(hessian_times(model, cross_entropy, batch, v), plain)
    cross_entropy(model, batch).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    assert 0 < gradient.abs().max() <= 1.01e-2  # they work after
    assert not torch.allclose(gradient, plain[0], rtol=0.5)


def test_forward_hooks_run_in_a_probe_and_backward_hooks_do_not():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    calls: list[str] = []

    def noting(kind: str) -> Callable[..., None]:
        return lambda *_: calls.append(kind)

    forward = {"forward pre", "forward"}
    backward = {"backward pre", "backward", "parameter", "accumulated", "global"}
    last = model[2]
    handles = [
        last.register_forward_pre_hook(noting("forward pre")),
        last.register_forward_hook(noting("forward")),
        last.register_full_backward_pre_hook(noting("backward pre")),
        last.register_full_backward_hook(noting("backward")),
        last.weight.register_hook(noting("parameter")),
        last.weight.register_post_accumulate_grad_hook(noting("accumulated")),
        nn.modules.module.register_module_full_backward_hook(noting("global")),
    ]
    batch[0].requires_grad_()  # or the global hook warns at the first layer
    try:
        hessian_times(model, backward_inside, batch, torch.ones(75))
        assert set(calls) == forward
        calls.clear()
        cross_entropy(model, batch).backward()
        assert set(calls) == forward | backward
    finally:
        for handle in handles:
            handle.remove()
    calls.clear()
    cross_entropy(model, batch).backward()
    assert calls == []  # the handles still know their hooks


def test_a_hook_that_the_loss_registers_is_taken_off_again():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        model[2].weight.register_hook(clip)
        model[2].bias.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())
        model[2].register_full_backward_hook(lambda *_: None)
        return cross_entropy(model, batch)

    geomwatch.measure(model, loss_fn, batch)
    assert not model[2].weight._backward_hooks
    assert not model[2].bias._post_accumulate_grad_hooks
    assert not model[2]._backward_hooks


# --- gradients -------------------------------------------------------------------------------


def backward_inside(model: nn.Module, batch: Any) -> Tensor:
    loss = cross_entropy(model, batch)
    loss.backward(retain_graph=True)
    return loss


@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_loss_that_calls_backward_adds_nothing_to_grad(has_gradient):
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    if has_gradient:
        cross_entropy(model, batch).backward()
    gradients = [p.grad for p in model.parameters()]
    before = everything(model)
    record = geomwatch.measure(model, backward_inside, batch)
    assert record["lambda_max"].value > 0
    assert_same(before, everything(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


class Adaptive(nn.Module):
    """Scales by a running size of its input, in place: a live graph has saved the buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("size", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        self.size.mul_(0.5).add_(x.detach().abs().mean(0), alpha=0.5)
        return self.linear(torch.tanh(self.linear.weight.sum(0) * self.size * x))


@pytest.mark.parametrize(
    "make", [noisy_mlp, Adaptive, lambda: old_style(nn.utils.spectral_norm), frozen, convolutional]
)
def test_a_measurement_between_forward_and_backward_leaves_the_gradients_alone(make):
    model, batch = make(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    twin = copy.deepcopy(model)
    seed(2)
    cross_entropy(twin, batch).backward()
    after_twin = everything(twin)
    seed(2)
    loss = cross_entropy(model, batch)
    record = geomwatch.measure(model, cross_entropy, batch)
    loss.backward()
    assert record["lambda_max"].value is not None
    assert_same(after_twin, everything(model))


# --- Python state ----------------------------------------------------------------------------


class Busy(nn.Module):
    """Keeps every kind of state that can be put back, and changes all of it in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.count = 0
        self.seen: list[int] = []
        self.cache: dict[str, Any] = {"old": torch.zeros(3), "nested": {"deep": [1, [2]]}}
        self.names = {"a"}
        self.recent = collections.deque([1, 2], maxlen=2)
        self.ordered = collections.OrderedDict(first=1, second=2)
        self.tally = collections.Counter(calls=1)
        self.pair = (torch.zeros(2), [5])
        self.average = torch.zeros(3)
        self.mask = torch.zeros(1, 3).expand(9, 3)
        self.histogram = np.zeros(4)
        self.numpy_rng = np.random.default_rng(0)
        self.legacy_rng = np.random.RandomState(0)
        self.python_rng = random.Random(0)
        self.torch_rng = torch.Generator().manual_seed(0)
        self.hidden = [nn.BatchNorm1d(3)]  # in a plain list, where modules() does not find it
        self.toggled = nn.Parameter(torch.ones(3), requires_grad=False)
        self.swapped = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(self.count)
        self.cache["new"] = x
        self.cache["nested"]["deep"][1].append(3)
        self.cache["old"] = self.cache["old"] + 1
        self.names.add("b")
        self.recent.append(3)
        self.ordered.move_to_end("first")
        self.tally["calls"] += 1
        self.tally["more"] += 1
        self.pair[0].add_(1)
        self.pair[1].append(6)
        self.average.mul_(0.9).add_(1.0)
        self.histogram[0] += 1
        noise = self.numpy_rng.normal() + self.legacy_rng.normal() + self.python_rng.random()
        y = self.linear(x) + noise + torch.rand(3, generator=self.torch_rng)
        self.toggled.requires_grad_(True)
        self.swapped.data = self.swapped.data * 2
        return self.hidden[0](y) * self.swapped

    def state(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if k[0] != "_" and not k.endswith("_rng")}
        kept |= {
            "numpy": self.numpy_rng.bit_generator.state,
            "legacy": self.legacy_rng.get_state()[1],
            "python": self.python_rng.getstate(),
            "torch": self.torch_rng.get_state(),
            "hidden": self.hidden[0].state_dict(),
            "toggled": self.toggled.requires_grad,
            "swapped": self.swapped.detach(),
        }
        return copy.deepcopy(kept)


def test_python_state_of_every_kind_is_put_back():
    model, batch = Busy(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    before = model.state()
    identities = {name: id(value) for name, value in vars(model).items() if name != "count"}
    place = model.swapped.data_ptr()
    with Objective(model, cross_entropy, [batch, batch]) as objective:
        first, second = objective.gradient(), objective.hvp(torch.ones(objective.layout.dim))
        assert not same(before, model.state())
        assert objective.changed_objects == []
    assert bool(first.any())
    assert bool(second.any())
    assert_same(before, model.state())
    assert {n: id(value) for n, value in vars(model).items() if n != "count"} == identities
    assert model.swapped.data_ptr() == place


def test_every_evaluation_starts_from_the_same_python_state():
    model, batch = Busy(), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    v = torch.ones(21)
    with Objective(model, cross_entropy, [batch, batch]) as objective:
        assert torch.equal(objective.hvp(v), objective.hvp(v))


class Meter:
    def __init__(self) -> None:
        self.total = 0.0


class Slotted:
    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


class Bank:
    def __init__(self) -> None:
        self.total = {"features": torch.zeros(3)}


class Metered(nn.Module):
    def __init__(self, meter: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.meter = meter

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.meter, Bank):
            self.meter.total["features"].add_(1)
        else:
            self.meter.total += 1
        return self.linear(x)


@pytest.mark.parametrize("meter", [Meter(), Slotted(), Bank()], ids=lambda m: type(m).__name__)
def test_an_object_that_cannot_be_put_back_is_named_in_one_warning(meter, caplog):
    model, batch = Metered(meter), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, every=1)
    with caplog.at_level(logging.WARNING, "geomwatch"):
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
    named = [m for m in caplog.messages if f"Metered.meter ({type(meter).__name__})" in m]
    assert len(named) == 1
    assert "loss_fn=" in named[0]
    assert "also=" in named[0]


def test_an_object_that_is_only_read_raises_no_warning(caplog):
    model, batch = Metered(Meter()), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with Objective(model, lambda m, b: F.cross_entropy(m.linear(b[0]), b[1]), [batch]) as objective:
        assert objective.is_finite()
        assert objective.changed_objects == []


def test_an_object_that_also_names_is_put_back_instead_of_watched():
    meter = Meter()
    model, batch = Metered(meter), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with Objective(model, cross_entropy, [batch], how=Settings(also=(meter,))) as objective:
        assert objective.is_finite()
        assert meter.total == 1
        assert objective.changed_objects == []
    assert meter.total == 0


@pytest.mark.parametrize(
    "large",
    [torch.zeros(1_000_001), nn.Parameter(torch.zeros(1_000_001), requires_grad=False)],
    ids=["attribute", "frozen parameter"],
)
def test_a_large_tensor_that_is_not_trained_is_watched_and_not_copied(large):
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    model.large = large
    with Objective(model, cross_entropy, [batch]) as objective:
        assert objective.is_finite()
        assert objective.changed_objects == []
        large[0] = 1
        assert objective.changed_objects == ["Sequential.large"]


def test_an_inference_tensor_as_an_attribute_disturbs_nothing():
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    with torch.inference_mode():
        model.last = model(batch[0])
    assert geomwatch.measure(model, cross_entropy, batch)["lambda_max"].value > 0


def test_a_long_list_is_put_back_without_looking_at_its_items():
    holder = types.SimpleNamespace(log=[[0] for _ in range(1_001)])
    snapshot = Snapshot([holder])
    holder.log.append([1])
    holder.log[0].append(1)
    snapshot.finish()
    assert len(holder.log) == 1_001
    assert holder.log[0] == [0, 1]


# --- other objects that the loss uses --------------------------------------------------------


def teacher() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


TEACHER = teacher()


def distil(student: nn.Module, batch: Any, *, by: nn.Module) -> Tensor:
    return F.mse_loss(student(batch[0]), by(batch[0]))


def distil_by_global(student: nn.Module, batch: Any) -> Tensor:
    return (lambda: distil(student, batch, by=TEACHER))()


def distil_by_helper(student: nn.Module, batch: Any) -> Tensor:
    return distil_by_global(student, batch)


class Host:
    """A host object whose method is the loss, as Lightning's and transformers' are."""

    def __init__(self, by: nn.Module) -> None:
        self.by = by
        self.calls = 0

    def loss(self, student: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return distil(student, batch, by=self.by)

    def __call__(self, student: nn.Module, batch: Any) -> Tensor:
        return self.loss(student, batch)


class Criterion(nn.Module):
    """A criterion with state, to be wrapped by geomwatch.supervised."""

    def __init__(self, by: nn.Module) -> None:
        super().__init__()
        self.by = by

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.by[1:](outputs), targets)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "closure": lambda t: lambda m, b: distil(m, b, by=t),
    "default": lambda t: lambda m, b, t=t: distil(m, b, by=t),
    "partial": lambda t: functools.partial(distil, by=t),
    "nested closure": lambda t: (lambda f: lambda m, b: f(m, b))(functools.partial(distil, by=t)),
    "method": lambda t: Host(t).loss,
    "callable": lambda t: Host(t),
    "criterion": lambda t: geomwatch.supervised(Criterion(t)),
    "module": lambda t: types.MethodType(distil_module, t),
}


def distil_module(self: nn.Module, student: nn.Module, batch: Any) -> Tensor:
    return distil(student, batch, by=self)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_teacher_that_the_loss_carries_along_is_isolated(way):
    other = teacher()
    assert_isolated(way(other), other)


@pytest.mark.parametrize("loss_fn", [distil_by_global, distil_by_helper])
def test_a_teacher_that_is_a_global_of_the_script_is_isolated(loss_fn):
    assert_isolated(loss_fn, TEACHER)


def test_a_teacher_that_only_also_names_is_isolated():
    other = teacher()
    owner = {"teacher": other}  # found by nobody: dictionaries in closures are not searched
    assert_isolated(lambda m, b: distil(m, b, by=owner["teacher"]), other, also=(other,))
    assert_isolated(lambda m, b: distil(m, b, by=owner["teacher"]), other, also=other)


def assert_isolated(loss_fn: Any, other: nn.Module, **options: Any) -> None:
    student, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    calls: list[int] = []
    handle = other[0].weight.register_hook(lambda _: calls.append(1))
    loss_fn(student, batch).backward()  # leaves gradients in the teacher too
    calls.clear()
    host = getattr(loss_fn, "__self__", loss_fn)
    before = everything(other), everything(student), getattr(host, "calls", None)
    record = geomwatch.measure(student, loss_fn, batch, **faced(options))
    handle.remove()
    assert record["lambda_max"].value is not None
    assert_same(before[0], everything(other))
    assert_same(before[1], everything(student))
    assert getattr(host, "calls", None) == before[2]
    assert calls == []
    assert all(m.training for m in other.modules())


def test_a_private_generator_named_in_also_is_replayed():
    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    owner = {"rng": torch.Generator().manual_seed(0), "python": random.Random(0)}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        noise = torch.randn(9, 5, generator=owner["rng"]) * owner["python"].random()
        return cross_entropy(model, (batch[0] + noise, batch[1]))

    state = owner["rng"].get_state(), owner["python"].getstate()
    with Objective(
        model, loss_fn, [batch, batch], how=Settings(also=tuple(owner.values()))
    ) as objective:
        v = torch.ones(objective.layout.dim)
        assert torch.equal(objective.hvp(v), objective.hvp(v))
    assert same(state, (owner["rng"].get_state(), owner["python"].getstate()))


def test_the_captured_objects_are_the_modules_and_owners_only():
    other, numbers = teacher(), [1, 2]
    assert captured_by(lambda m, b: (other, numbers)) == [other]
    assert captured_by(F.cross_entropy) == []
    assert captured_by(len) == []
    host = Host(other)
    assert captured_by(host.loss) == [host]


# --- batches ---------------------------------------------------------------------------------


def spoiling(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    labels = batch.pop("labels")
    batch["inputs"].mul_(0.5)
    batch["more"]["weights"][0] = 7
    batch["array"] += 1
    batch["extra"].clear()
    return F.cross_entropy(model(batch["inputs"]), labels)


def test_a_loss_that_spoils_its_batch_spoils_a_copy():
    batch = {
        "inputs": torch.randn(9, 5),
        "labels": torch.randint(0, 3, (9,)),
        "more": {"weights": torch.ones(3)},
        "array": np.zeros(2),
        "extra": [1, 2],
    }
    before = copy.deepcopy(batch)
    model = mlp(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, spoiling, optimizer)
    spoiling(model, copy.deepcopy(batch)).backward()
    record = monitor.step(batch)
    assert record["lambda_max"].value > 0
    assert same(before, batch)


class Custom:
    """A batch type of one's own, as the DataLoader's documentation shows it."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def pin_memory(self) -> Custom:
        return self


class Stored(collections.abc.MutableMapping):
    """A mapping whose shallow copy shares its items."""

    def __init__(self, **items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._items[key] = value

    def __delitem__(self, key: str) -> None:
        del self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    inputs: Tensor
    labels: Tensor


Named = collections.namedtuple("Named", "inputs labels")

BATCHES: dict[str, Callable[..., Any]] = {
    "dict": dict,
    "UserDict": collections.UserDict,
    "OrderedDict": collections.OrderedDict,
    "custom object": Custom,
    "custom mapping": Stored,
    "proxy": lambda **items: types.MappingProxyType(items),
    "namespace": types.SimpleNamespace,
    "dataclass with slots": Slots,
    "namedtuple": Named,
    "nested": lambda **items: [({"all": (items["inputs"], [items["labels"]])},)],
}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_of_any_type_is_copied_counted_and_cut(make):
    inputs, labels = torch.randn(9, 5), torch.randint(0, 3, (9,))
    batch = make(inputs=inputs, labels=labels)
    replica = batches.fresh_copy(batch)
    copied = list(batches.tensors(replica))
    assert type(replica) is (dict if isinstance(batch, types.MappingProxyType) else type(batch))
    assert same(copied, [inputs, labels])
    copied[0].zero_()
    assert bool(inputs.any())
    assert [id(t) for t in batches.tensors(batch)] == [id(inputs), id(labels)]
    assert batches.items(batch) == 9
    assert [len(t) for t in batches.tensors(batches.head(batch, 4))] == [4, 4]
    assert [len(t) for t in batches.tensors(batch)] == [9, 9]


def test_taking_from_a_copied_mapping_leaves_the_users_mapping_alone():
    batch = Stored(inputs=torch.randn(9, 5), labels=torch.zeros(9))
    batches.fresh_copy(batch).pop("labels")
    assert len(batch) == 2


def test_what_is_no_batch_is_passed_through():
    module, words = mlp(5, 3), ["a", "b"]
    replica = batches.fresh_copy((module, words, torch.Size([2]), 3, None))
    assert replica[0] is module
    assert replica[1:] == (words, torch.Size([2]), 3, None)
    assert replica[1] is not words


def test_a_copied_input_still_requires_its_gradient():
    x = torch.ones(3, requires_grad=True)
    inputs, derived = batches.fresh_copy((x, 2 * x))
    assert inputs.requires_grad
    assert inputs.is_leaf
    assert derived.requires_grad
    assert derived.is_leaf


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.cfloat]
)
def test_a_fingerprint_knows_a_reordered_batch_and_tells_another(dtype):
    inputs, flags = torch.randn(9, 5), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 0]).to(dtype)
    mark = batches.fingerprint({"x": inputs, "flags": flags})
    order = torch.randperm(9)
    assert batches.fingerprint({"x": inputs[order], "flags": flags[order]}) == pytest.approx(mark)
    other = flags.clone()
    other[0] = 0
    assert batches.fingerprint({"x": inputs, "flags": other}) != pytest.approx(mark)


# --- surroundings ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "surroundings",
    [
        torch.no_grad,
        torch.inference_mode,
        functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    ],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_the_surroundings_of_a_measurement_do_not_matter(surroundings):
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.Adam(model.parameters())
    plain = geomwatch.measure(model, cross_entropy, batch, optimizer=optimizer)
    with surroundings():
        before = everything(model, optimizer)
        record = geomwatch.measure(model, cross_entropy, batch, optimizer=optimizer)
        assert_same(before, everything(model, optimizer))
    assert record.estimates == plain.estimates
    assert record.provenance["dtype"] == "float32"


def test_batches_made_under_inference_mode_can_be_measured_on():
    model = mlp(5, 8, 3)
    with torch.inference_mode():
        batch = (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    plain = geomwatch.measure(model, cross_entropy, (batch[0].clone(), batch[1].clone()))
    assert geomwatch.measure(model, cross_entropy, batch).estimates == plain.estimates


def test_a_monitor_works_under_inference_mode():
    model, batch = mlp(5, 8, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.Adam(model.parameters())
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    cross_entropy(model, batch).backward()
    with torch.inference_mode():
        record = monitor.step(batch)
    assert record["stability_margin"].value > 0


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="needs torch >= 2.9")
def test_tf32_settings_and_all_other_flags_of_a_backend_survive_a_probe_of_an_rnn():
    net = NETS["LSTM"]
    model, batch = net.make(), net.batch()
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # now reading the older allow_tf32 raises
    try:
        assert geomwatch.measure(model, cross_entropy, batch)["lambda_max"].value > 0
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_the_environment_can_turn_geomwatch_off(monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    seen: list[bool] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(geomwatch.is_probing())
        return cross_entropy(model, batch)

    model, batch = mlp(5, 3), (torch.randn(9, 5), torch.randint(0, 3, (9,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = geomwatch.Monitor(model, loss_fn, optimizer, every=1)
    for _ in range(2):
        loss_fn(model, batch).backward()
        assert monitor.step(batch) is None
        optimizer.step()
    assert seen == [False, False]
    assert monitor.history == []
    monkeypatch.setenv("GEOMWATCH_DISABLE", "0")
    monitor = geomwatch.Monitor(model, loss_fn, optimizer)
    assert monitor.step(batch) is not None
    assert True in seen


# --- modes -----------------------------------------------------------------------------------


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
