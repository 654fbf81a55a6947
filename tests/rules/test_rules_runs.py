"""The default rules on real runs: healthy ones are quiet, and two false alarms are not made."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from problems import cross_entropy, digits, mlp
from torch import Tensor, nn

import geomwatch
from geomwatch.records import Alert
from geomwatch.stability.problem import stability_of
from geomwatch.vectors.layout import Layout

Batch = tuple[Tensor, Tensor]


class RowReader(nn.Module):
    """A transformer that reads a digit row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 24)
        self.position = nn.Parameter(torch.zeros(8, 24))
        self.encoder = nn.TransformerEncoderLayer(
            24, 2, 48, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.view(-1, 8, 8)) + self.position).mean(1))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def adam(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.Adam(model.parameters(), lr=lr)


def batches(seed: int, size: int = 64):
    inputs, targets = digits(1797)
    rng = torch.Generator().manual_seed(seed)
    while True:
        pick = torch.randint(0, len(inputs), (size,), generator=rng)
        yield inputs[pick], targets[pick]


def watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    data,
    *,
    loss_fn=cross_entropy,
    scheduler=None,
    before: Callable[[int], None] = lambda step: None,
    every: int = 100,
) -> geomwatch.Monitor:
    with geomwatch.Monitor(model, loss_fn, optimizer, every=every) as monitor:
        for step, batch in enumerate(itertools.islice(data, steps)):
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            before(step)
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
    return monitor


def loud(alerts: list[Alert]) -> list[str]:
    return [f"{a.rule} {a.severity} at {a.step}" for a in alerts if a.severity != "info"]


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (lambda: mlp(64, 128, 64, 10), sgd(0.05)),
        (lambda: mlp(64, 128, 64, 10), adam(3e-3)),
        (convnet, sgd(0.05)),
        (convnet, adam(3e-3)),
        (RowReader, sgd(0.05)),
        (RowReader, adam(3e-3)),
    ],
    ids=[
        "mlp sgd",
        "mlp adam",
        "batchnorm sgd",
        "batchnorm adam",
        "transformer sgd",
        "transformer adam",
    ],
)
@pytest.mark.parametrize("schedule", ["constant", "warm-up and cosine"])
def test_a_healthy_run_is_quiet(build, make, schedule):
    torch.manual_seed(0)
    model, steps = build(), 150
    optimizer = make(model)
    scheduler = None
    if schedule != "constant":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=steps + 1
        )
    monitor = watched(model, optimizer, steps, batches(0), scheduler=scheduler)
    inputs, targets = digits(1797)
    assert F.cross_entropy(model(inputs), targets) < 0.8  # it has learnt something
    assert loud(monitor.alerts) == []


def half_square(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean() / 2


def test_six_hundred_steps_at_the_edge_of_stability_are_information():
    torch.manual_seed(0)
    model = mlp(64, 32, 10, activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    data = itertools.repeat(digits(400))
    monitor = watched(model, optimizer, 800, data, loss_fn=half_square, every=50)
    settled = [r["stability_margin"].value for r in monitor.history if r.step >= 200]
    assert len(settled) >= 5
    assert 0.85 < min(settled) < max(settled) < 1.3
    assert loud(monitor.alerts) == []
    assert "edge of stability" in "".join(a.message for a in monitor.alerts)


def raw_margin(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, *, damped: bool
) -> float:
    """lambda_max of the step's operator by power iteration, as one would compute it by hand."""
    layout = Layout.of(model)
    options = {} if damped else {"damping": "none", "cold_start": True}
    stability = stability_of(optimizer, layout, **options)
    gradients = torch.autograd.grad(cross_entropy(model, batch), layout.params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])

    def hvp(v: Tensor) -> Tensor:
        products = torch.autograd.grad(flat, layout.params, v, retain_graph=True)
        return torch.cat([p.reshape(-1) for p in products])

    apply = stability.apply(hvp)
    v = torch.randn(layout.dim, generator=torch.Generator().manual_seed(0))
    for _ in range(60):
        v = apply(v / v.norm())
    return float(v.norm())


def test_the_cold_start_of_adam_is_no_alarm_though_its_raw_margin_is():
    torch.manual_seed(0)
    model = mlp(64, 128, 64, 10)
    optimizer, data = adam(3e-3)(model), batches(0)
    raw: list[float] = []

    def look(step: int) -> None:
        if step < 3:
            raw.append(raw_margin(model, optimizer, seen[-1], damped=False))

    seen: list[Batch] = []

    def noted():
        for batch in data:
            seen.append(batch)
            yield batch

    monitor = watched(model, optimizer, 200, noted(), before=look)
    assert max(raw) > 1.5  # beyond what is stable, if P stood still
    assert max(r["stability_margin"].value for r in monitor.history) < 0.5
    assert loud(monitor.alerts) == []
    inputs, targets = digits(1797)
    assert F.cross_entropy(model(inputs), targets) < 0.3


def test_small_weights_before_a_batchnorm_are_no_alarm_though_their_curvature_is():
    torch.manual_seed(0)
    model = convnet()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d):
                layer.weight *= 0.2  # as weight decay would leave them; the net is the same
    optimizer = sgd(0.05)(model)
    monitor = watched(model, optimizer, 200, batches(0))
    first = monitor.history[0]
    raw = 0.05 * first["lambda_max"].value / (2 * 1.9)
    assert raw > 1.8  # nearly twice what is stable
    assert first["stability_margin"].value < 0.5
    assert loud(monitor.alerts) == []


@pytest.mark.parametrize("factor", [16, 30])
def test_a_scheduler_that_jumps_too_far_is_critical_before_the_step(factor):
    torch.manual_seed(0)
    model = mlp(64, 128, 64, 10)
    optimizer = sgd(0.05)(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [120], gamma=factor)
    losses: list[float] = []

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(model, batch)
        if not geomwatch.is_probing():
            losses.append(loss.item())
        return loss

    monitor = watched(model, optimizer, 160, batches(0), loss_fn=loss_fn, scheduler=scheduler)
    assert max(losses[:121]) < 2.5 < max(losses[121:])  # the step at 120 ruins it
    assert [(a.rule, a.severity) for a in monitor.alerts if a.step == 120 and a.rule == "rate_jump"]
    assert not [a for a in monitor.alerts if a.step < 120 and a.severity != "info"]


@pytest.mark.parametrize("factor", [0.1, 4])
def test_a_scheduler_that_jumps_within_reason_is_not(factor):
    torch.manual_seed(0)
    model = mlp(64, 128, 64, 10)
    optimizer = sgd(0.02)(model)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [120], gamma=factor)
    monitor = watched(model, optimizer, 160, batches(0), scheduler=scheduler)
    assert loud(monitor.alerts) == []
