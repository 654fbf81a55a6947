"""Probes that a sentinel calls for: what batch noise adds, before anything hinges on it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from faces import faced
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.controllers import LearningRateCap
from geomwatch.monitoring.second_look import SecondLook
from geomwatch.records import Estimate
from geomwatch.rules import Observation


def glance(step: int, along: float | None, *, lr: float = 0.1, **more: Any) -> Observation:
    """Batches of 64, SGD with momentum 0.9: the level is 7."""
    defaults: dict[str, Any] = {"limit_ratio": 19.0, "items": 64}
    return Observation(index=step, lr=(lr,), gradient_margin=Estimate(along), **defaults | more)


def found(mean_square: float | None, status: str = "ok") -> dict[str, Estimate]:
    return {
        "stability_margin": Estimate(0.2),
        "stochastic_margin": Estimate(mean_square, status=status),
    }


@pytest.mark.parametrize(("controlled", "level"), [(False, 3.01), (True, 0.91)])
def test_it_is_due_where_rules_or_caps_are_about_to_act(controlled, level):
    look = SecondLook(controlled=controlled)
    assert not look.due(glance(50, 0.97 * level))
    assert look.due(glance(50, 1.03 * level))
    assert look.due(glance(50, -1.03 * level))  # a cap goes by the absolute value
    assert not look.due(glance(50, None))


def test_the_very_first_steps_and_full_batches_have_none():
    look = SecondLook(controlled=False)
    assert not look.due(glance(4, 30.0))
    assert look.due(glance(20, 30.0))
    assert not look.due(glance(20, 30.0, same_data=True))


def test_optimizers_without_a_limit_have_none():
    look = SecondLook(controlled=False)
    unknown = Estimate(5.0, status="unknown")
    assert not look.due(glance(5, 30.0, margin=unknown))
    assert not look.due(glance(50, 30.0, margin=unknown))


def test_a_suspicious_start_has_one_and_goes_on_to_be_looked_at_later():
    look = SecondLook(controlled=True)
    assert not look.due(glance(5, 2.9))  # above the level of controllers, but they wait
    assert look.due(glance(5, 3.1))
    assert look.due(glance(5, 0.1, margin=Estimate(0.31)))
    assert not look.due(glance(5, 0.1, margin=Estimate(0.29)))
    look.probed(5, (0.1,), found(0.3))  # a noise part of 0.1
    assert not look.due(glance(8, 30.0))
    again = SecondLook(controlled=True)
    again.load_state_dict(json.loads(json.dumps(look.state_dict())))
    assert not again.due(glance(8, 30.0))
    assert again.due(glance(20, 30.0))


@pytest.mark.parametrize(
    ("noise", "adaptive", "looks"),
    [
        (0.1, False, []),
        (0.13, False, [5]),
        (0.2, False, [5, 8]),
        (0.4, False, [5]),
        (0.7, True, []),
        (0.8, True, [5]),
        (1.0, True, [5, 8]),
    ],
)
def test_a_start_is_looked_at_again_as_long_as_its_noise_is_near_the_level(noise, adaptive, looks):
    look = SecondLook(controlled=False)
    look.probed(0, (0.1,), found(0.2 + noise))
    seen = []
    for step in (1, 5, 8, 18):
        if look.due(glance(step, 0.1, adaptive=adaptive)):
            seen.append(step)
            look.probed(step, (0.1,), found(0.2 + noise))
    assert seen == looks


def test_the_next_one_comes_at_three_times_the_step():
    look = SecondLook(controlled=False)
    look.probed(30, (0.1,), found(0.5))
    assert not look.due(glance(89, 30.0))
    assert look.due(glance(90, 30.0))


def test_the_next_one_comes_before_that_where_the_rate_has_doubled():
    look = SecondLook(controlled=False)
    look.probed(30, (0.1,), found(0.5))
    assert not look.due(glance(40, 30.0, lr=0.19))
    assert look.due(glance(40, 30.0, lr=0.21))
    again = SecondLook(controlled=False)
    again.load_state_dict(json.loads(json.dumps(look.state_dict())))
    assert not again.due(glance(40, 30.0, lr=0.19))
    assert again.due(glance(40, 30.0, lr=0.21))


def test_what_could_not_be_had_is_not_tried_again():
    look = SecondLook(controlled=False)
    look.probed(30, (0.1,), found(None, "withheld"))
    assert not look.due(glance(10**6, 30.0))
    again = SecondLook(controlled=False)
    again.load_state_dict(json.loads(json.dumps(look.state_dict())))
    assert not again.due(glance(10**6, 30.0))


def test_probes_that_did_not_look_change_nothing():
    look = SecondLook(controlled=False)
    look.probed(30, (0.1,), {"stability_margin": Estimate(0.2)})
    look.probed(30, (0.1,), found(0.5, "held"))
    look.probed(3, (0.1,), found(0.5))  # too early to tell
    assert look.due(glance(5, 30.0))
    assert look.due(glance(31, 30.0))


def trained(lr: float, steps: int, **options: Any) -> tuple[geomwatch.Monitor | None, list[Any]]:
    """A run that can pay for no probe but the first, and those that sentinels call for."""
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    inputs, targets = digits(1024)
    batches = itertools.cycle(list(zip(inputs.split(64), targets.split(64), strict=True)))
    monitor = None
    if options.pop("watched", True):
        monitor = geomwatch.Monitor(
            model, cross_entropy, optimizer, **faced({"budget": 1e-9} | options)
        )
    for batch in itertools.islice(batches, steps):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        if monitor is not None:
            monitor.step(batch, loss=loss.detach())
        optimizer.step()
    return monitor, [p.detach().clone() for p in model.parameters()]


def looks(monitor: geomwatch.Monitor) -> list[int]:
    return [
        record.step
        for record in monitor.history
        if "stochastic_margin" in record.estimates and record["stochastic_margin"].status == "ok"
    ]


def test_a_run_near_its_limit_is_looked_at_and_a_calm_one_is_not(clock_that_runs):
    near, weights = trained(0.3, 120)
    assert near is not None
    later = [step for step in looks(near) if step >= 20]
    assert looks(near)[0] == 0
    assert later[0] < 100
    assert all(step >= 3 * later[0] for step in later[1:2])
    assert not near.history[-1].provenance["same_data"]  # one step looked at twice is one step
    calm, _ = trained(0.02, 120)
    assert calm is not None
    assert looks(calm) == [0]
    _, alone = trained(0.3, 120, watched=False)
    assert all(torch.equal(a, b) for a, b in zip(weights, alone, strict=True))


def test_with_controllers_it_comes_at_lower_margins(clock_that_runs):
    controlled, _ = trained(0.1, 120, controllers=[LearningRateCap()])
    assert controlled is not None
    assert looks(controlled)


@pytest.mark.parametrize("options", [{"quantities": ["loss"]}])
def test_who_has_chosen_what_to_measure_has_none(options):
    monitor, _ = trained(0.3, 60, every=50, **options)
    assert monitor is not None
    assert not set(looks(monitor)) - {0, 50}
