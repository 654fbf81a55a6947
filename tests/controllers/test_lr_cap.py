"""The cap of the learning rate on observations made by hand."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace

import pytest

from geomwatch.controllers import LearningRateCap, Move
from geomwatch.errors import UsageError
from geomwatch.observation.step import Settled
from geomwatch.records import Alert, Estimate
from geomwatch.rules import Observation


def glanced(step: int, margin: float | None, *, lr=0.1, status="ok", **more) -> Observation:
    """The gradient margin, at the user's rate, was measured just now."""
    rates = lr if isinstance(lr, tuple) else (lr,)
    estimate = Estimate(margin, status=status)
    more = {"optimizer": "SGD momentum 0.9", "limit_ratio": 19.0} | more
    return Observation(index=step, lr=rates, gradient_margin=estimate, gradient_fresh=True, **more)


def passed(step: int, *, lr=0.1, **more) -> Observation:
    """Nothing was measured at this step."""
    rates = lr if isinstance(lr, tuple) else (lr,)
    return Observation(
        index=step, lr=rates, **{"optimizer": "SGD momentum 0.9", "limit_ratio": 19.0} | more
    )


class Applied:
    """Follows the cap as its actuator would."""

    def __init__(self, cap: LearningRateCap) -> None:
        self.cap = cap
        self.setting = math.inf
        self.advice: list[Move] = []

    def __call__(self, seen: Observation) -> float:
        """Return the rate that the step is taken with, for the largest group."""
        for move in self.cap(seen):
            if move.advice:
                self.advice.append(move)
            else:
                self.setting = move.to
        return min(max(seen.lr), self.setting)

    def rates(self, observations: Iterable[Observation]) -> list[float]:
        return [self(seen) for seen in observations]


def test_a_margin_within_the_limit_leaves_the_rate_alone():
    applied = Applied(LearningRateCap())
    assert applied.rates(glanced(t, 1.9) for t in range(50)) == [0.1] * 50


def test_the_first_step_is_taken_at_the_limit():
    assert Applied(LearningRateCap())(glanced(0, 8.0)) == pytest.approx(0.1 * 2 / 8)


def test_methods_that_adapt_are_held_to_half_of_that_unless_told_otherwise():
    seen = glanced(0, 8.0, adaptive=True)
    assert Applied(LearningRateCap())(seen) == pytest.approx(0.1 / 8)
    assert Applied(LearningRateCap(c_bs=4.0))(seen) == pytest.approx(0.4 / 8)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_curvature_does_not_matter(sign):
    assert Applied(LearningRateCap())(glanced(0, sign * 8.0)) == pytest.approx(0.025)


def test_curvature_is_averaged_without_a_bias_at_the_start():
    applied = Applied(LearningRateCap(smoothing=0.8))
    applied(glanced(0, 4.0))
    mean = (0.8 * 4 + 10) / 1.8
    assert applied(glanced(1, 10.0)) == pytest.approx(0.1 * 2 / mean)


def test_between_measurements_the_users_present_rate_meets_the_cap():
    applied = Applied(LearningRateCap())
    applied(glanced(0, 4.0, lr=0.1))  # up to 0.05
    user = [0.02, 0.05, 0.08, 3.0, 0.01]
    rates = [applied(passed(1 + i, lr=rate)) for i, rate in enumerate(user)]
    assert rates == pytest.approx([0.02, 0.05, 0.05, 0.05, 0.01])


def test_a_rate_that_jumps_is_held_before_its_first_step():
    applied = Applied(LearningRateCap())
    applied(glanced(0, 0.4, lr=0.01))
    assert applied(passed(1, lr=1.0)) == pytest.approx(0.05)


def test_a_schedule_that_starts_at_zero_teaches_nothing_and_divides_by_nothing():
    applied = Applied(LearningRateCap())
    assert applied(glanced(0, 0.0, lr=0.0)) == 0.0
    assert applied(glanced(1, 4.0, lr=0.1)) == pytest.approx(0.05)


@pytest.mark.parametrize("interval", [1, 5, 10])
def test_the_rate_rises_with_the_steps_however_many_measurements_they_hold(interval):
    applied = Applied(LearningRateCap(smoothing=1e-9, release=1.25))
    applied(glanced(0, 2000.0))
    rates = [applied(glanced(t, 0.1)) for t in range(interval, 51, interval)]
    assert rates[-1] == pytest.approx(1e-4 * 1.25**10, rel=1e-6)


def test_a_long_gap_between_measurements_does_not_let_the_rate_jump():
    applied = Applied(LearningRateCap(smoothing=1e-9))
    applied(glanced(0, 2000.0))
    assert applied(glanced(500, 0.1)) == pytest.approx(1e-4 * 1.25**2)


@pytest.mark.parametrize(
    "useless",
    [
        passed(40),
        glanced(40, None, status="failed"),
        glanced(40, math.nan),
        glanced(40, 0.001, status="unknown"),
        glanced(40, math.inf),
    ],
)
def test_a_measurement_that_failed_or_is_not_trusted_never_raises_the_rate(useless):
    applied = Applied(LearningRateCap())
    low = applied(glanced(0, 20.0))
    assert applied(useless) == pytest.approx(low)


def test_the_rate_is_never_lowered_beyond_its_floor():
    applied = Applied(LearningRateCap(min_scale=0.01))
    assert applied(glanced(0, 1e9)) == pytest.approx(0.001)
    assert applied(passed(1, lr=0.02)) == pytest.approx(0.0002)


def test_adams_first_steps_count_as_large_as_they_are():
    applied = Applied(LearningRateCap())
    assert applied(glanced(0, 1.0, cold_start=10.0)) == pytest.approx(0.02)
    # the factor has gone, and the rate may rise with the steps
    assert applied(glanced(5, 1.0, cold_start=1.0)) == pytest.approx(0.025)


def test_full_batch_training_is_held_to_the_limit_of_full_batches():
    at_the_edge = {"same_data": True, "limit_ratio": 19.0}
    applied = Applied(LearningRateCap())
    # that it is full-batch is known from the second probe on
    assert applied(glanced(0, 15.0, fresh=True)) < 0.02
    assert applied(glanced(1, 15.0, fresh=True, **at_the_edge)) == 0.1
    assert applied.rates(glanced(t, 15.0) for t in range(2, 40)) == [0.1] * 38


def test_a_second_cap_looks_at_the_top_of_the_spectrum_with_its_error():
    top = Estimate(0.9, 0.1, "residual")
    seen = Observation(index=0, lr=(0.1,), margin=top, fresh=True)
    assert Applied(LearningRateCap())(seen) == pytest.approx(0.1 * 0.7 / 0.9)  # of a start
    later = Observation(index=30, lr=(0.1,), margin=top, fresh=True)
    assert Applied(LearningRateCap())(later) == 0.1
    assert Applied(LearningRateCap(c_lambda=0.5))(later) == pytest.approx(0.05)
    beyond = replace(later, margin=Estimate(1.9, 0.1, "residual"))
    assert Applied(LearningRateCap())(beyond) == pytest.approx(0.05)
    assert Applied(LearningRateCap())(replace(beyond, same_data=True)) == 0.1


def told(step: int, loss: float, margin: float, **more) -> Observation:
    """The gradient margin and the loss of the step before."""
    return glanced(step, margin, settled=Settled(step - 1, loss, 1.0, stepped=True), **more)


def test_no_step_goes_above_the_rate_that_a_critical_alert_has_advised():
    applied = Applied(LearningRateCap())
    assert applied.rates(glanced(t, 0.1) for t in range(5)) == [0.1] * 5
    advised = Alert("headroom", "critical", "the next steps lose it", 0.7, 0.5, 5, advised_lr=0.03)
    (move,) = applied.cap(glanced(5, 0.1), [advised])
    assert move.to == 0.03
    applied.setting = move.to
    assert applied.rates(glanced(t, 0.01) for t in range(6, 60)) == [0.03] * 54
    assert applied(glanced(60, 0.001, lr=0.02)) == 0.02  # the schedule's own


RISEN = Alert("loss_rise", "critical", "the loss has risen", 3.0, 2.0, 40)


def test_after_a_blow_up_the_rate_is_held_until_the_loss_is_back():
    """A net that a step has killed has little curvature."""
    applied = Applied(LearningRateCap(smoothing=1e-9, release=1e6))
    applied.rates(told(t, 2.0 - 0.01 * t, 40.0) for t in range(1, 40))
    (move,) = applied.cap(
        told(40, 6.0, 40.0), [RISEN]
    )  # a quarter of the limit, since that was too much
    assert move.to == pytest.approx(0.1 * 2 / 40 / 4)
    applied.setting = move.to
    dead = applied.rates(told(t, 2.3, 0.01) for t in range(41, 141, 10))
    assert max(dead) == pytest.approx(0.1 * 2 / 40 / 4)
    back = applied.rates(told(t, 1.5, 0.01) for t in range(141, 181))
    assert back[-1] == 0.1


def test_the_rate_goes_up_only_while_the_loss_goes_down():
    for falling, rises in ((0.01, True), (0.0, False), (-0.01, False)):
        applied = Applied(LearningRateCap(smoothing=1e-9))
        rates = applied.rates(told(t, 3 - falling * t, 200 / t) for t in range(1, 100))
        assert (rates[-1] > 2 * rates[0]) is rises


def test_a_schedule_does_not_take_the_rate_up_while_looks_fail():
    applied = Applied(LearningRateCap())
    applied(glanced(0, 0.1, lr=0.01))
    failing = [passed(t, lr=0.01 * t, unseen="out of memory") for t in range(1, 6)]
    assert applied.rates(failing) == pytest.approx([0.01] * 5)
    assert applied(passed(6, lr=0.06)) == 0.06


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (passed(0, margin=Estimate(3.0, status="unknown", reason="no formula for Lion")), "Lion"),
        (passed(0, unseen="a probe failed with ValueError"), "nothing was measured yet: a probe"),
    ],
)
def test_it_abstains_where_there_is_nothing_to_go_by(seen, reason):
    (move,) = LearningRateCap()(seen)
    assert move.abstains
    assert move.to == math.inf
    assert reason in move.reason


def test_several_groups_keep_their_proportion():
    applied = Applied(LearningRateCap())
    assert applied(glanced(0, 4.0, lr=(0.1, 0.01))) == pytest.approx(0.05)
    # the second group is raised to where its own share meets the limit
    assert applied(passed(1, lr=(0.1, 0.1))) == pytest.approx(0.005)
    assert applied(passed(2, lr=(0.1, 0.01))) == pytest.approx(0.05)


def test_a_group_that_is_unfrozen_is_not_held_to_what_is_not_known_of_it():
    applied = Applied(LearningRateCap())
    applied(glanced(0, 4.0, lr=(0.1, 0.0)))
    assert applied(passed(1, lr=(0.0, 0.3))) == 0.3
    assert applied(passed(2, lr=(0.1, 0.3))) == pytest.approx(0.15)  # both by the first's half


def test_the_reason_says_the_margin_and_whether_the_rate_still_rises():
    cap = LearningRateCap(smoothing=1e-9)
    (move,) = cap(glanced(0, 8.0))
    assert "learning rate 0.1 held at 0.025" in move.reason
    assert "it is 8 of what is stable (to stay below 2)" in move.reason
    (move,) = cap(glanced(5, 1.0))
    assert "it is 1 of what is stable (to stay below 2, approached in small steps)" in move.reason


def test_patience_waits_in_steps_before_the_rate_goes_down():
    applied = Applied(LearningRateCap(patience=10))
    rates = [applied(glanced(t, 4.0)) for t in (0, 4, 8)] + [applied(passed(10))]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05])


def test_cooldown_keeps_the_rate_down_for_some_steps():
    applied = Applied(LearningRateCap(cooldown=20, smoothing=1e-9))
    applied(glanced(0, 40.0))
    assert applied(glanced(19, 0.1)) == pytest.approx(0.005)
    assert applied(glanced(20, 0.1)) > 0.005


def trained(losses, *, margin=4.0, start=0, **more) -> list[Observation]:
    """Steps after which these losses became known."""
    return [
        glanced(start + t, margin, settled=Settled(start + t, loss, 1.0, stepped=True), **more)
        for t, loss in enumerate(losses)
    ]


def noisy(number, falling=0.0):
    noise = random.Random(0)
    return [2 - falling * t + noise.gauss(0, 0.1) for t in range(number)]


def test_the_limit_falls_once_the_loss_has_stopped_falling_at_a_high_rate():
    applied = Applied(LearningRateCap(factor=0.25))
    rates = applied.rates(trained([2.0] * 310))
    assert rates[:149] == pytest.approx([0.05] * 149)
    assert rates[149:299] == pytest.approx([0.0125] * 150)
    assert rates[299:] == pytest.approx([0.0125 / 4] * 11)
    (move,) = LearningRateCap()(glanced(0, 4.0))
    assert "stopped falling" not in move.reason
    (move,) = applied.cap(glanced(310, 16.0))[:1]
    assert "(to stay below 0.125, 16 x lower since the loss stopped falling" in move.reason


@pytest.mark.parametrize(
    "given",
    [
        {"losses": noisy(600, falling=0.002)},  # it falls, if slowly
        {"losses": noisy(600), "margin": 0.9},  # the rate is not what keeps the loss up
        {"losses": noisy(600), "same_data": True, "fresh": True},  # no noise to be averaged out
        {"losses": [None] * 600},
        {"losses": [math.nan] * 600},
    ],
)
def test_the_limit_stays_where_the_rate_is_not_why_the_loss_does_not_fall(given):
    capped, plain = (Applied(LearningRateCap(factor=f)) for f in (0.25, 1.0))
    assert capped.rates(trained(**given)) == plain.rates(trained(**given))


def test_a_base_rate_that_is_lowered_often_is_said_to_be_too_high_once():
    applied = Applied(LearningRateCap())
    applied.rates(glanced(t, 6.0) for t in range(200))
    (advice,) = applied.advice
    assert advice.to == pytest.approx(0.1 / 3)
    assert "your base rate is about 3 x too high" in advice.reason


def test_a_base_rate_that_is_lowered_now_and_then_is_not_complained_of():
    applied = Applied(LearningRateCap(smoothing=1e-9, release=1e6))
    applied.rates(glanced(t, 6.0 if t % 4 == 0 else 0.5) for t in range(200))
    assert not applied.advice


@pytest.mark.parametrize("number", [50, 263, 400])
def test_a_cap_goes_on_from_its_state_as_if_it_had_not_stopped(number):
    run = [
        glanced(t, 3 + math.sin(t), lr=0.1 + 0.05 * math.cos(t)) if t % 3 == 0 else passed(t)
        for t in range(120)
    ]
    run += trained(noisy(300), start=120)
    whole = Applied(LearningRateCap())
    expected = whole.rates(run)
    first = Applied(LearningRateCap())
    begun = first.rates(run[:number])
    second = Applied(LearningRateCap())
    second.cap.load_state_dict(json.loads(json.dumps(first.cap.state_dict())))
    second.setting = first.setting
    assert begun + second.rates(run[number:]) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c_bs": 0}, "c_bs must be a number above 0, got 0"),
        ({"c_lambda": -1.0}, "c_lambda must be a number above 0, got -1.0"),
        ({"release": 1.0}, "release must be a number above 1, got 1.0"),
        ({"smoothing": 1.0}, "smoothing must be a number between 0 and 1, got 1.0"),
        ({"factor": 0}, "factor must be a number between 0 and 1, got 0"),
        ({"min_scale": "low"}, "min_scale must be a number between 0 and 1, got 'low'"),
        ({"patience": -1}, "patience must be an integer >= 0, got -1"),
    ],
)
def test_what_cannot_be_a_setting_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        LearningRateCap(**options)
