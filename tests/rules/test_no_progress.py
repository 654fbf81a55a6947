"""Steps that change nothing are told within the first hundred; healthy runs are quiet."""

from __future__ import annotations

import pytest
import torch
from observations import brief, heard
from torch import nn
from torch.nn import functional as F

from geomwatch import Monitor
from geomwatch.observation.movement import Movement
from geomwatch.observation.step import Settled
from geomwatch.rules import NoProgress, Observation

STUCK = Movement(20, 0.9, 1e-4, "bfloat16", 0.1)
SLOW = Movement(20, 0.1, 1e-7, "float32", 0.1)


def seen(step: int, moved: Movement | None = None, *, loss=1.0, norm=1.0, lr=0.1, **more):
    settled = Settled(step - 1, loss, norm, True)
    return Observation(index=step, lr=(lr,), settled=settled, movement=moved, **more)


@pytest.mark.parametrize(
    ("moved", "words"), [(STUCK, "round away in bfloat16"), (SLOW, "by 5e-09")]
)
def test_two_comparisons_that_show_no_movement_warn(moved, words):
    (alert,) = heard(NoProgress(), [seen(20, moved), seen(40, moved), seen(60, moved)])
    assert (alert.step, alert.severity) == (40, "warning")
    assert words in alert.message


@pytest.mark.parametrize(
    "more", [{"lr": 0.0}, {"lr": 0.2}, {"peak": (0.3,)}], ids=["zero", "rising", "headed for more"]
)
def test_a_schedule_that_begins_low_is_quiet(more):
    assert not heard(NoProgress(), [seen(20 * t, STUCK, **more) for t in range(1, 9)])


def test_the_end_of_a_schedule_and_a_loss_that_has_fallen_are_quiet():
    assert not heard(NoProgress(), [seen(1, lr=1.0)] + [seen(20 * t, SLOW) for t in range(1, 9)])
    fallen = [seen(t, loss=1.0 if t < 3 else 0.1) for t in range(20)]
    assert not heard(NoProgress(), fallen + [seen(20 * t, SLOW, loss=0.1) for t in range(1, 9)])


def test_gradients_that_are_exactly_zero_warn_unless_the_loss_is_so_too():
    assert brief(heard(NoProgress(), [seen(t, norm=0.0) for t in range(6)])) == [(2, "warning")]
    assert not heard(NoProgress(), [seen(t, norm=0.0, loss=0.0) for t in range(6)])
    now_and_then = [seen(t, norm=1.0 if t % 3 == 0 else 0.0) for t in range(30)]
    assert not heard(NoProgress(), now_and_then)


# In a monitor


def trained(model, optimizer, *, steps=100, schedule=None, dtype=torch.float32, rules=None):
    told = []

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    monitor = Monitor(model, loss_fn, optimizer, rules=rules or NoProgress(), on_alert=told.append)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(32, 8, generator=rng)
        batch = x.to(dtype), x[:, :4].sum(1, keepdim=True).to(dtype)
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        monitor.step(batch, loss=loss.detach())
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return told


def net(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 1))


def test_updates_that_round_away_in_bfloat16_are_told():
    model = net().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    (alert,) = trained(model, optimizer, dtype=torch.bfloat16)
    assert alert.step <= 60
    assert "round away in bfloat16" in alert.message


@pytest.mark.parametrize("lr", [1e-10, 1e-9])
def test_a_rate_that_is_far_too_small_is_told(lr):
    model = net()
    (alert,) = trained(model, torch.optim.SGD(model.parameters(), lr=lr))
    assert alert.step <= 60


def test_units_that_are_all_dead_are_told():
    model = net()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
        model[2].bias.requires_grad_(False)
    (alert,) = trained(model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert alert.step <= 10
    assert "exactly zero 3 times in a row" in alert.message


HEALTHY = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.005, momentum=0.9),
    "small rate": lambda p: torch.optim.SGD(p, lr=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw, fine-tuning": lambda p: torch.optim.AdamW(p, lr=1e-5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "converged": lambda p: torch.optim.Adam(p, lr=3e-2),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_runs_are_quiet(name):
    model = net()
    assert not trained(model, HEALTHY[name](model.parameters()))


@pytest.mark.parametrize("warm_up", [50, 10_000])
def test_a_warm_up_from_a_rate_of_zero_is_quiet(warm_up):
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, t / warm_up))
    assert not trained(model, optimizer, schedule=schedule)


def test_a_healthy_run_in_bfloat16_is_quiet():
    model = net().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    assert not trained(model, optimizer, dtype=torch.bfloat16)
