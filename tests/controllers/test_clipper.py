"""The clipper on histories of gradient norms made by hand."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch import nn

from geomwatch.controllers import GradientClipper
from geomwatch.controllers.actuators import StepClip
from geomwatch.errors import UsageError
from geomwatch.observation.step import Settled
from geomwatch.records import Alert
from geomwatch.rules import Observation

SPIKE = Alert("grad_norm_spike", "warning", "a spike", 9.0, 3.0, 0)


def stepped(step: int, norm: float, *, taken: bool = True) -> Observation:
    return Observation(index=step, lr=(0.1,), settled=Settled(step - 1, 1.0, norm, taken))


def norms(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.lognormvariate(0, 0.3) for _ in range(count)]


def run(clipper: GradientClipper, history, alerts=(), start: int = 1) -> list[tuple[int, float]]:
    """Return (step, norm to clip at) of each move; `alerts` are the steps that raise one."""
    moves = []
    for t, norm in enumerate(history, start):
        raised = [SPIKE] if t in alerts else []
        moves += [(t, move.to) for move in clipper(stepped(t, norm), raised)]
    return moves


def test_nothing_is_clipped_without_an_alert():
    assert run(GradientClipper(), norms(500)) == []


def test_an_alert_clips_at_the_percentile_of_the_norms_so_far():
    history = norms(200)
    ((step, norm), *_) = run(GradientClipper(percentile=90), history, alerts={150})
    assert step == 150
    assert norm == pytest.approx(torch.tensor(history[:150]).quantile(0.9).item(), rel=1e-6)


def test_clipping_ends_when_there_was_no_alert_for_a_while():
    moves = run(GradientClipper(cooldown=60), norms(500), alerts={150, 180})
    assert [step for step, _ in moves] == [150, 240]
    assert moves[-1] == (240, math.inf)


def test_a_level_that_every_step_reaches_is_told_of_once():
    clipper = GradientClipper(cooldown=1000)
    assert run(clipper, norms(100), alerts={100})
    moves = [m for t in range(101, 400) for m in clipper(stepped(t, 50.0 + t % 2))]
    (move,) = (m for m in moves if m.advice)
    assert move.to == pytest.approx(51.0)
    assert "each of the last 25 gradients was clipped" in move.reason
    now_and_then = GradientClipper(rules=None)
    moves = [m for t, norm in enumerate(norms(400), 1) for m in now_and_then(stepped(t, norm))]
    assert moves
    assert not any(m.advice for m in moves)


def test_information_and_other_alerts_do_not_start_it():
    clipper = GradientClipper()
    run(clipper, norms(100))
    others = [
        Alert("grad_norm_spike", "info", "", 1, 1, 100),
        Alert("loss_rise", "warning", "", 1, 1, 100),
    ]
    assert not clipper(stepped(101, 1.0), others)


def test_patience_waits_for_a_second_alert():
    clipper = GradientClipper(patience=1, cooldown=60)
    assert [t for t, _ in run(clipper, norms(300), alerts={100, 200, 210})] == [210, 270]


def test_without_rules_it_clips_always_after_the_first_norms():
    moves = run(GradientClipper(rules=None, percentile=50), [1.0] * 24 + [2.0] * 200)
    assert moves[0] == (25, 1.0)
    assert moves[-1][1] == pytest.approx(2.0)
    assert len(moves) < 10  # not one for each step


def test_a_z_score_clips_at_mean_and_deviations():
    history = norms(25)
    ((step, norm),) = run(GradientClipper(policy="zscore", z=2.5, rules=None), history)
    tensor = torch.tensor(history)
    assert step == 25
    assert norm == pytest.approx((tensor.mean() + 2.5 * tensor.std(correction=0)).item(), rel=1e-5)


def test_a_spike_does_not_teach_the_z_score_that_spikes_are_usual():
    clipper = GradientClipper(policy="zscore", rules=None)
    before = run(clipper, norms(200))[-1][1]
    run(clipper, [1e6], start=201)
    after = clipper._policy.threshold()
    assert after < 2 * before


def test_norms_of_steps_that_were_not_taken_do_not_count():
    clipper = GradientClipper(rules=None)
    moves = [clipper(stepped(t, 1.0, taken=t > 20)) for t in range(1, 45)]
    assert not any(moves)
    assert not clipper(stepped(45, math.inf))
    assert clipper(stepped(46, 1.0))


def test_the_bound_is_never_clipped_below():
    ((_, norm),) = run(GradientClipper(rules=None, min_norm=5.0), [1.0] * 40)
    assert norm == 5.0


@pytest.mark.parametrize("policy", ["percentile", "zscore"])
def test_a_clipper_goes_on_from_its_state_as_if_it_had_not_stopped(policy):
    history, alerts = norms(300), {60, 130, 200}
    whole = run(GradientClipper(policy=policy, cooldown=50), history, alerts)
    first, second = (GradientClipper(policy=policy, cooldown=50) for _ in range(2))
    moves = run(first, history[:90], alerts)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert moves + run(second, history[90:], alerts, start=91) == whole
    assert len(whole) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "best"}, 'policy must be "percentile" or "zscore", got \'best\''),
        ({"percentile": 100}, "percentile must be a number between 0 and 100, got 100"),
        ({"z": 0}, "z must be a number above 0, got 0"),
        ({"min_norm": -1}, "min_norm must be a number at least 0, got -1"),
        ({"cooldown": 0}, "cooldown must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        GradientClipper(**options)


# Its actuator in a plain loop


def test_a_step_is_taken_with_the_clipped_gradient_of_all_groups():
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD([{"params": [w]} for w in weights], lr=1.0)
    clip = StepClip(optimizer)
    for w, g in zip(weights, (3.0, 4.0), strict=True):
        w.grad = torch.tensor([g])
    clip.set(1.0)
    optimizer.step()
    assert [w.item() for w in weights] == pytest.approx([-0.6, -0.8], rel=1e-5)
    clip.set(math.inf)
    weights[0].grad.fill_(3.0)
    optimizer.step()
    assert weights[0].item() == pytest.approx(-3.6, rel=1e-5)


def test_a_closed_clip_leaves_gradients_alone():
    w = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([w], lr=1.0)
    clip = StepClip(optimizer)
    clip.set(1.0)
    clip.close()
    w.grad = torch.tensor([5.0])
    optimizer.step()
    assert w.item() == -5.0
