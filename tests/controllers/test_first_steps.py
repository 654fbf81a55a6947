"""What batch noise lets the cap of the learning rate do in the first steps."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest
import torch
from observations import measured
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.controllers import LearningRateCap
from geomwatch.controllers.learning_rate_cap.limit import CapLimits
from geomwatch.controllers.learning_rate_cap.start import Start
from geomwatch.observation.step import Settled
from geomwatch.records import Estimate
from geomwatch.rules import Observation


def start(
    step: int, noise: float, *, margin: float = 0.05, along: float = 0.1, **more: Any
) -> Observation:
    """A probe has found so much noise beside a margin."""
    estimates = {
        "stability_margin": Estimate(margin),
        "stochastic_margin": Estimate(margin + noise, 0.01, "stderr"),
    }
    along_gradient = {"gradient_margin": Estimate(along), "gradient_fresh": True}
    more = {"limit_ratio": 19.0} | along_gradient | more
    return measured(step, margin, estimates=estimates, **more)


def later(step: int, *, lr: float = 0.1, along: float = 0.1, **more: Any) -> Observation:
    """A sentinel has found nothing to speak of."""
    known = {"gradient_margin": Estimate(along), "gradient_fresh": True, "limit_ratio": 19.0}
    return Observation(step, (lr,), **known | more)


def test_noise_stays_below_its_limit_from_the_first_step_on():
    (move,) = LearningRateCap()(start(0, 0.6))
    assert move.to == pytest.approx(0.1 * 0.1 / 0.6)
    assert (
        "while the loss stands where it began, curvature, and how much batches disagree"
        in move.reason
    )
    assert LearningRateCap()(start(0, 0.09))[0].to > 0.1  # than the rate: nothing is held
    (move,) = LearningRateCap()(start(5, 3.0, adaptive=True))
    assert move.to == pytest.approx(0.1 / 3)


def test_noise_of_a_single_squared_gradient_counts_as_far_as_the_margin_is_high():
    """A fresh head on a pretrained net has a hundred of it at a good rate."""
    (move,) = LearningRateCap()(start(0, 100.0, adaptive=True))
    assert move.to > 0.1
    (move,) = LearningRateCap()(start(0, 100.0, margin=0.6, adaptive=True))
    assert move.to == pytest.approx(0.1 / 4)


def test_so_does_the_margin_of_the_full_batch():
    sharp = {"gradient_margin": Estimate(0.1), "gradient_fresh": True}
    (move,) = LearningRateCap()(measured(0, 1.4, **sharp))
    assert move.to == pytest.approx(0.1 / 2)
    assert LearningRateCap()(measured(0, 0.6, **sharp))[0].to > 0.1
    assert LearningRateCap()(measured(5, 1.4, same_data=True, **sharp))[0].to > 0.1


def test_it_is_held_against_the_rate_of_each_step_until_others_take_over():
    cap = Start(CapLimits())
    cap.update(start(0, 0.08))
    assert cap.allows(later(1)) == pytest.approx(1.25)
    assert cap.allows(later(1, lr=0.4)) == pytest.approx(1.25 / 4)
    assert cap.allows(later(20, lr=0.4)) == math.inf
    assert cap.allows(later(1, lr=0.4, same_data=True)) == math.inf
    cap.update(start(20, 9.0))  # noise has grown
    assert cap.allows(later(19)) == pytest.approx(1.25)


def after(step: int, loss: float, **more: Any) -> Observation:
    """The loss of the step before has become known."""
    return later(step, settled=Settled(step - 1, loss, 1.0, stepped=True), **more)


def test_a_start_lasts_until_the_loss_has_clearly_fallen():
    """A schedule would take the rate up across a plateau, where noise is no larger than before."""
    cap = Start(CapLimits())
    cap.update(start(0, 0.05))
    noise = random.Random(0)
    for step in range(1, 60):
        cap.update(after(step, 2.3 + noise.gauss(0, 0.03)))
    assert cap.allows(later(60, lr=1.6)) == pytest.approx(0.1 / 0.8)
    cap.update(start(60, 0.4, lr=0.4))  # measured again while it lasts
    assert cap.allows(later(60, lr=1.6)) == pytest.approx(0.1 / 1.6)
    for step in range(61, 72):
        cap.update(after(step, 2.2 + noise.gauss(0, 0.03)))
    assert cap.allows(later(72, lr=1.6)) == math.inf


def test_the_rate_goes_up_slowly_when_it_ends():
    cap = LearningRateCap()
    rates = [cap(start(0, 0.6))[0].to]
    for step in range(10, 60, 10):
        rates += [move.to for move in cap(later(step))]
    assert rates[0] == pytest.approx(0.1 / 6)
    growths = [b / a for a, b in itertools.pairwise(rates)]
    assert growths[0] == pytest.approx(1.25**2)
    assert all(1 < g < 1.25**2 * 1.001 for g in growths)


def test_who_sets_a_limit_gets_that_alone():
    (move,) = LearningRateCap(c_bs=2)(start(0, 0.6, margin=0.01))
    assert move.to == pytest.approx(0.1 * 2 / 0.1)


def test_it_is_remembered():
    cap, again = LearningRateCap(), LearningRateCap()
    cap(start(0, 0.6))
    again.load_state_dict(json.loads(json.dumps(cap.state_dict())))
    assert again(later(1, lr=0.2)) == cap(later(1, lr=0.2))
    assert again.state_dict() == cap.state_dict()


def test_a_run_far_too_fast_is_slowed_before_its_first_step():
    torch.manual_seed(0)
    model = mlp(64, 64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.9)
    taken: list[float] = []
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer, controllers=[LearningRateCap()])
    optimizer.register_step_pre_hook(lambda o, *_: taken.append(o.param_groups[0]["lr"]))
    cross_entropy(model, digits(16)).backward()
    monitor.step(digits(16))
    optimizer.step()
    assert taken[0] < 1.0
