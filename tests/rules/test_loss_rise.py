"""When a loss counts as risen, and when a start has taught nothing."""

from __future__ import annotations

import math
import random
import re
import statistics
from dataclasses import replace

import pytest
import torch
from observations import brief, heard, losses, trained
from problems import cross_entropy, digits, mlp

from geomwatch.observation.step import Settled
from geomwatch.records import Estimate
from geomwatch.rules import LossRise, Observation


def noisy(rng: random.Random, mean: float, batch: int = 4) -> float:
    """The mean of a few losses with a heavy tail, as those of single items have."""
    return statistics.fmean(mean * rng.lognormvariate(-0.5, 1.0) for _ in range(batch))


def healthy(rng: random.Random, steps: int) -> list[float]:
    return [noisy(rng, 0.3 + 2.0 * math.exp(-t / 80)) for t in range(steps)]


@pytest.mark.parametrize("seed", range(40))
def test_the_noise_of_batches_of_four_is_quiet(seed):
    assert not heard(LossRise(), losses(healthy(random.Random(seed), 800)))


@pytest.mark.parametrize("seed", [1, 2])
def test_training_on_batches_of_four_digits_is_quiet(seed):
    torch.manual_seed(seed)
    model, (inputs, targets) = mlp(64, 64, 10), digits(1797)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    rng, rule = torch.Generator().manual_seed(seed), LossRise()
    for step in range(2000):
        pick = torch.randint(0, len(inputs), (4,), generator=rng)
        optimizer.zero_grad()
        loss = cross_entropy(model, (inputs[pick], targets[pick]))
        loss.backward()
        optimizer.step()
        assert rule(trained(step, loss.item())) is None


@pytest.mark.parametrize("seed", range(20))
def test_a_blow_up_is_loud_in_the_same_noise(seed):
    rng, rule = random.Random(seed), LossRise()
    assert not heard(rule, losses(healthy(rng, 300)))
    blow_up = [noisy(rng, 0.3 * 1.15**t) for t in range(40)]
    alerts = heard(rule, losses(blow_up, start=300))
    assert [a.severity for a in alerts] in (["warning", "critical"], ["critical"])
    assert alerts[0].step <= 300 + 20  # the loss is at twice the first
    assert alerts[-1].step <= 300 + 26  # at five times


def test_a_blow_up_does_not_pass_for_its_own_noise():
    rng, rule = random.Random(0), LossRise()
    heard(rule, losses([2.3 * math.exp(-t / 50) + rng.uniform(0.2, 0.4) for t in range(200)]))
    assert brief(heard(rule, losses([50.0] * 20, start=200))) == [(200, "critical")]


def test_one_bad_batch_is_no_rise():
    rule = LossRise()
    heard(rule, losses([2.3 * math.exp(-t / 50) + 0.2 for t in range(300)]))
    assert not heard(rule, losses([4.0] + [0.2] * 100, start=300))
    assert brief(heard(rule, losses([1.5] * 30, start=401))) == [(404, "warning")]


def test_a_loss_above_the_first_is_critical():
    rule = LossRise()
    heard(rule, losses([2.3 * math.exp(-t / 50) + 0.2 for t in range(300)]))
    alerts = heard(rule, losses([0.2 + 0.2 * t for t in range(40)], start=300))
    assert [a.severity for a in alerts] == ["warning", "critical"]
    assert alerts[0].value > alerts[0].limit
    assert alerts[1].value > 2.5 + 0.3 * 2.2  # above the first loss by the same amount


def started(*values: float, margin: float | None = 0.7, status="ok", items: int = 16, **more):
    known = None if margin is None else Estimate(margin, status=status)
    return [replace(seen, items=items, margin=known, **more) for seen in losses(values)]


STUCK = (2.0, 2.7, 2.75, 2.5, 2.2, 2.3, 1.9, 2.2, 2.0, 2.4)


def test_a_start_near_the_limit_that_has_taught_nothing_is_a_warning_after_ten_steps():
    (alert,) = heard(LossRise(), started(*STUCK))
    assert (alert.step, alert.severity) == (9, "warning")
    assert (alert.value, alert.limit) == (pytest.approx(2.2), pytest.approx(2.1))
    assert "the median of the last 5 is 2.2, the first was 2 (alert above 2.1)" in alert.message
    assert alert.message.startswith("Start again at a learning rate of about 0.01")
    assert "margin has been up to 0.7." in alert.message
    assert heard(LossRise(), started(*STUCK, margin=3.1, same_data=True))


def test_a_spike_of_the_start_is_a_warning_where_it_has_not_healed_and_the_margin_is_high():
    spiked = (2.0, 1.9, 1.8, 3.0, 1.7, 3.0, 1.5, 1.4, 1.3, 1.2)
    (alert,) = heard(LossRise(), started(*spiked))
    assert (alert.step, alert.severity) == (5, "warning")
    assert (alert.value, alert.limit) == (3.0, pytest.approx(2.8))
    assert "a loss is 3, the first was 2 (alert above 2.8)" in alert.message
    assert not heard(LossRise(), started(*spiked, margin=0.5))
    assert not heard(LossRise(), started(*spiked, items=15))
    healed = (2.0, 1.9, 1.8, 3.0, 3.0, 1.6, 1.5, 1.4, 1.3, 1.2)
    assert not heard(LossRise(), started(*healed))
    later = (2.0, *[1.0] * 10, 3.0, *[1.0] * 10)
    assert not heard(LossRise(), started(*later))


def advised(message: str) -> float:
    found = re.search(r"learning rate (?:of|from \S+ to) about \S+ \((\S+) x\)", message)
    assert found, message
    return float(found[1])


@pytest.mark.parametrize(
    ("gradient", "factor"),
    [(None, 0.1), (-3.0, 0.1), (12.0, 0.1), (20.0, 0.0735), (1e6, 1 / 30)],
)
def test_the_advice_goes_by_the_margins_before_the_rise_within_bounds(gradient, factor):
    rule = LossRise()
    for seen in losses([2.0] * 50 + [6.0] * 9):
        fresh = seen.index < 50
        known = None if gradient is None else Estimate(gradient)
        alert = rule(replace(seen, gradient_margin=known, gradient_fresh=fresh, limit_ratio=19.0))
        if alert is not None:
            break
    assert alert is not None
    assert alert.severity == "critical"
    assert "Go back to an earlier checkpoint, or start again, at a learning" in alert.message
    assert advised(alert.message) == pytest.approx(factor, rel=0.05)  # two digits


def test_margins_that_are_shares_of_no_limit_are_no_reason_for_an_advice():
    rule = LossRise()
    unknown = Estimate(50.0, status="unknown")
    more = {"margin": unknown, "gradient_margin": Estimate(1e6), "gradient_fresh": True}
    alerts = heard(rule, [replace(seen, **more) for seen in losses([2.0] * 50 + [6.0] * 9)])
    assert advised(alerts[0].message) == pytest.approx(0.1)


def test_the_largest_margin_of_the_start_counts():
    run = started(*STUCK, margin=0.1)
    run[1] = replace(run[1], margin=Estimate(0.7))
    assert brief(heard(LossRise(), run)) == [(9, "warning")]


@pytest.mark.parametrize(
    "run",
    [
        started(2.0, 2.7, 2.7, 2.5, 2.4, 2.3, 1.9, 1.8, 2.0, 2.4),  # a rise that heals
        started(*STUCK, margin=0.5),  # the rate is not why
        started(*STUCK, margin=None),
        started(*STUCK, status="unknown"),  # no share of a limit
        started(*STUCK, margin=2.9, same_data=True),  # a catapult
        started(*STUCK, items=15),
        started(*[2.0, 2.1] * 4, *[2.2, 2.3] * 5),
    ],
)
def test_what_may_be_no_bad_start_is_left_alone(run):
    assert not heard(LossRise(), run)


def test_a_loss_that_comes_down_again_may_rise_again():
    rule = LossRise()
    low, high = [0.2] * 100, [1.5] * 30
    heard(rule, losses([2.3 * math.exp(-t / 50) + 0.2 for t in range(300)]))
    alerts = heard(rule, losses(high + low + high, start=300))
    assert [a.severity for a in alerts] == ["warning", "warning"]


def test_a_loss_that_comes_down_half_way_has_not_come_down():
    rule = LossRise()
    heard(rule, losses([1.0] * 5 + [0.1] * 200))
    half_way = [0.6] * 10 + ([0.1] * 10 + [0.3] * 10) * 5 + [0.6] * 10
    assert [a.severity for a in heard(rule, losses(half_way, start=205))] == ["warning"]


def test_the_losses_of_probes_do_where_the_loop_passes_none():
    falling = [2.3 * math.exp(-t / 5) + 0.2 for t in range(20)]
    rising = [0.2 + 0.4 * t for t in range(16)]
    run = [
        Observation(
            index=50 * t, lr=(0.1,), loss=loss, settled=Settled(50 * t - 1, None, 1.0, True)
        )
        for t, loss in enumerate(falling + rising)
    ]
    alerts = heard(LossRise(), run)
    assert [a.severity for a in alerts] == ["warning", "critical"]
    assert all(a.step >= 1000 and a.step % 50 == 0 for a in alerts)


def test_the_training_loss_goes_before_that_of_the_probe():
    rule = LossRise()
    heard(rule, losses([1.0] * 50))
    both = [
        Observation(index=51 + t, lr=(0.1,), loss=90.0, settled=Settled(50 + t, 1.0, 1.0, True))
        for t in range(20)
    ]
    assert not heard(rule, both)


def test_a_loss_that_is_not_finite_is_left_to_the_other_rule():
    rule = LossRise()
    heard(rule, losses([1.0] * 50))
    assert not heard(rule, losses([math.nan, math.inf, -math.inf] * 5, start=50))
    assert not heard(rule, losses([1.0] * 50, start=65))


def test_a_loss_near_the_largest_double_is_an_alert_and_no_overflow():
    rule = LossRise()
    heard(rule, losses([1.0] * 20))
    assert brief(heard(rule, losses([1e300] * 3, start=20))) == [(22, "critical")]
    heard(LossRise(), losses([1.0, 1e300, 1.0]))


def test_a_loss_below_zero_can_rise_too():
    rule = LossRise()
    heard(rule, losses([-1.0 - 9 * t / 100 for t in range(101)]))
    assert [a.severity for a in heard(rule, losses([-6.0] * 10, start=101))] == ["warning"]
