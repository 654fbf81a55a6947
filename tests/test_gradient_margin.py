"""The rule on what sentinels measure."""

from __future__ import annotations

import math
from typing import Any

import pytest

from geomwatch.records import Alert, Estimate
from geomwatch.rules import Observation
from geomwatch.rules.gradient_margin import GradientMargin


def seen(step: int, along: float | None, lr: float = 0.1, **more: Any) -> Observation:
    """A sentinel whose margin is given in units of the full-batch limit, noise ratio 19."""
    value = None if along is None else 19 * along
    defaults: dict[str, Any] = {"gradient_fresh": True, "noise_ratio": 19.0}
    return Observation(
        step=step,
        lr=(lr,),
        gradient_margin=Estimate(value, None if value is None else 0.0),
        **defaults | more,
    )


def alerts(rule: GradientMargin, course: dict[int, float | None], **more: Any) -> list[Alert]:
    found = (rule(seen(step, along, **more)) for step, along in course.items())
    return [alert for alert in found if alert is not None]


def test_a_margin_that_stays_high_is_warned_of_once():
    (alert,) = alerts(GradientMargin(), {step: 0.6 for step in range(20, 400, 20)})
    assert (alert.severity, alert.value) == ("warning", pytest.approx(0.6))
    assert "learning rate 0.1 comes close to" in alert.message
    assert "0.60 of the limit" in alert.message
    assert "about 0.05 (0.47 x)" in alert.message


def test_single_high_values_among_low_ones_are_no_news():
    course = {step: (1.5 if step % 80 == 0 else 0.1) for step in range(20, 800, 20)}
    assert not alerts(GradientMargin(), course)


def test_the_first_steps_and_the_first_values_do_not_warn():
    assert not alerts(GradientMargin(), {step: 0.9 for step in (0, 1, 2, 3, 5, 8, 18)})
    assert not alerts(GradientMargin(), {step: 0.9 for step in (200, 220, 240)})


@pytest.mark.parametrize("step", [1, 50])
def test_one_value_far_beyond_the_limit_is_critical(step):
    (alert,) = alerts(GradientMargin(), {step: 5.0})
    assert alert.severity == "critical"
    assert "is beyond" in alert.message


def test_weights_that_are_too_sharp_at_step_0_may_be_left_behind():
    assert not alerts(GradientMargin(), {0: 5.0})


def test_full_batch_training_lives_at_the_limit():
    course = {step: 1.05 for step in range(20, 600, 20)}
    assert not alerts(GradientMargin(), course, deterministic=True)


def test_values_held_from_before_are_re_scaled_when_the_rate_rises():
    rule = GradientMargin()
    assert not alerts(rule, {step: 0.15 for step in (100, 110, 120, 130)})
    (alert,) = alerts(rule, {140: 0.6}, lr=0.4)
    assert alert.value == pytest.approx(0.6)


@pytest.mark.parametrize("margin", [None, -0.5, 0.0])
def test_what_is_missing_or_concave_raises_nothing(margin):
    assert not alerts(GradientMargin(), {step: margin for step in range(20, 300, 20)})


def test_optimizers_without_a_limit_are_left_alone():
    unknown = Estimate(3.0, 0.1, status="unknown")
    course = {step: 3.0 for step in range(20, 300, 20)}
    assert not alerts(GradientMargin(), course, margin=unknown)


def test_only_what_was_measured_now_counts():
    course = {step: 3.0 for step in range(20, 300, 20)}
    assert not alerts(GradientMargin(), course, gradient_fresh=False)


def test_of_a_probe_the_rule_on_its_margin_speaks():
    rule = GradientMargin()
    assert not alerts(rule, {step: 5.0 for step in range(20, 300, 20)}, fresh=True)
    (alert,) = alerts(rule, {300: 0.1})
    assert alert.severity == "warning"  # what probes measured counts in the mean


def test_it_resumes_where_it_stopped():
    whole, first, second = GradientMargin(), GradientMargin(), GradientMargin()
    course = {s: 0.2 + s / 500 for s in range(20, 400, 20)}
    early = {s: m for s, m in course.items() if s < 120}
    late = {s: m for s, m in course.items() if s >= 120}
    expected = alerts(whole, course)
    found = alerts(first, early)
    second.load_state_dict(first.state_dict())
    assert found + alerts(second, late) == expected
    assert expected
    assert all(math.isfinite(a.value) for a in expected)
