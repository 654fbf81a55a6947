"""The rule on what sentinels measure."""

from __future__ import annotations

import math
from typing import Any

import pytest
from observations import Watched, heard

from geomwatch.records import Alert, Estimate
from geomwatch.rules import Observation
from geomwatch.rules.gradient_margin import GradientMargin


def seen(step: int, along: float | None, lr: float = 0.1, **more: Any) -> Observation:
    """A sentinel whose margin is in units of the small-batch limit; batches of 64, momentum 0.9."""
    defaults: dict[str, Any] = {"gradient_fresh": True, "limit_ratio": 19.0, "items": 64}
    return Observation(
        index=step,
        lr=(lr,),
        gradient_margin=Estimate(along, None if along is None else 0.0),
        **defaults | more,
    )


def alerts(
    rule: GradientMargin | Watched, course: dict[int, float | None], **more: Any
) -> list[Alert]:
    return heard(rule, (seen(step, along, **more) for step, along in course.items()))


def brief(found: list[Alert]) -> list[tuple[int, str]]:
    return [(alert.step, alert.severity) for alert in found]


SPARSE = range(20, 400, 20)


def test_a_margin_that_stays_high_is_warned_of_once():
    (alert,) = alerts(GradientMargin(), dict.fromkeys(SPARSE, 8.0))
    assert (alert.step, alert.severity, alert.value) == (80, "warning", pytest.approx(8.0))
    assert alert.limit == pytest.approx(7.0)
    assert alert.message == (
        "Lower the learning rate from 0.1 to about 0.018 (0.18 x), or end its warm-up there. "
        "Curvature along the steps is 8 x the limit of small batches (alert above 7).\n"
        "Mean of 4 measurements in 60 steps: more than batches of 64 survive for long with the "
        "optimizer; the full batch would allow 19. More: geomwatch explain gradient_margin."
    )
    assert alert.advised_lr == pytest.approx(0.018, rel=0.03)
    assert not alerts(GradientMargin(), dict.fromkeys(SPARSE, 6.9))


@pytest.mark.parametrize(("items", "level"), [(8, 3.5), (64, 7.0), (512, 14.0), (0, 7.0)])
def test_larger_batches_bear_more(items, level):
    below, above = dict.fromkeys(SPARSE, 0.97 * level), dict.fromkeys(SPARSE, 1.03 * level)
    assert not alerts(GradientMargin(), below, items=items)
    assert brief(alerts(GradientMargin(), above, items=items)) == [(80, "warning")]


def test_no_level_lies_beyond_the_edge_of_the_full_batch_or_below_that_of_small_ones():
    huge = 64 * 1000
    (alert,) = alerts(GradientMargin(), dict.fromkeys(SPARSE, 26.0), items=huge)
    assert alert.limit == pytest.approx(1.3 * 19)
    (alert,) = alerts(GradientMargin(), dict.fromkeys(SPARSE, 1.5), items=1, limit_ratio=1.0)
    assert alert.limit == pytest.approx(1.3)


def agreeing(step: int, along: float, noise: float) -> Observation:
    """A probe whose stochastic margin is `noise` times its margin."""
    estimates = {"stability_margin": Estimate(0.2), "stochastic_margin": Estimate(0.2 * noise)}
    return seen(step, along, fresh=True, estimates=estimates)


def test_batches_that_agree_on_the_curvature_bear_more():
    for noise, level in ((1.2, 17.5), (1.4, 7.0)):
        for share in (0.97, 1.03):
            rule = Watched(GradientMargin())
            rule(agreeing(25, share * level, noise))
            found = alerts(rule, dict.fromkeys(range(30, 75, 5), share * level))
            assert brief(found) == ([(40, "warning")] if share > 1 else [])
            if noise < 1.3 and found:
                assert "batches of 64 that agree on the curvature survive" in found[0].message
                assert found[0].limit == pytest.approx(17.5)
                assert "0.2 x" in found[0].message  # to a fifth of that level


def test_that_they_agree_is_believed_for_a_while():
    rule = Watched(GradientMargin())
    rule(agreeing(25, 8.0, 1.2))
    (alert,) = alerts(rule, dict.fromkeys(range(30, 120, 5), 8.0))
    assert alert.step == 80  # three times step 25


def test_methods_that_adapt_bear_more():
    assert not alerts(GradientMargin(), dict.fromkeys(SPARSE, 11.7), adaptive=True)
    assert alerts(GradientMargin(), dict.fromkeys(SPARSE, 12.3), adaptive=True)


def test_three_high_ones_in_a_row_are_enough():
    course = dict.fromkeys(range(100, 400, 20), 1.0) | {400: 14.0, 410: 14.0, 420: 14.0}
    assert brief(alerts(GradientMargin(), course)) == [(420, "warning")]
    assert not alerts(GradientMargin(), course, adaptive=True)


def test_single_high_values_among_low_ones_are_no_news():
    course = {step: (30.0 if step % 80 == 0 else 2.0) for step in range(20, 800, 20)}
    assert not alerts(GradientMargin(), course)


@pytest.mark.parametrize(("value", "is_told"), [(22.5, True), (21.5, False)])
def test_one_of_the_first_steps_far_beyond_is_critical(value, is_told):
    found = alerts(GradientMargin(), {0: 1.0, 1: 1.0, 5: value})
    assert brief(found) == [(5, "critical")] * is_told
    assert not alerts(GradientMargin(), {0: value, 1: value, 2: value})  # a spike may heal
    assert not alerts(GradientMargin(), {13: value})
    assert not alerts(GradientMargin(), {5: value}, adaptive=True)


@pytest.mark.parametrize("step", [1, 50])
def test_one_value_beyond_twice_the_limit_of_the_full_batch_is_critical(step):
    assert brief(alerts(GradientMargin(), {step: 39.0})) == [(step, "critical")]
    assert not alerts(GradientMargin(), {step: 37.0})


def test_what_is_critical_goes_before_a_warning_that_is_further_beyond_its_level():
    course = {100: 30.0, 110: 30.0, 120: 39.0}  # 2.5 times the level of three, once 1.03 x the edge
    assert brief(alerts(GradientMargin(), course)) == [(120, "critical")]


def test_weights_that_are_too_sharp_at_step_0_may_be_left_behind():
    assert not alerts(GradientMargin(), {0: 95.0})


def test_full_batch_training_lives_at_the_limit():
    edge = {step: 1.25 * 19 for step in SPARSE}
    assert not alerts(GradientMargin(), edge, same_data=True)
    beyond = {step: 1.35 * 19 for step in SPARSE}
    assert alerts(GradientMargin(), beyond, same_data=True)


def test_values_held_from_before_are_re_scaled_when_the_rate_rises():
    rule = Watched(GradientMargin())
    assert not alerts(rule, {step: 2.0 for step in (100, 110, 120, 130)})
    (alert,) = alerts(rule, {140: 8.0}, lr=0.4)
    assert alert.value == pytest.approx(8.0)


@pytest.mark.parametrize("margin", [None, -10.0, 0.0])
def test_what_is_missing_or_concave_raises_nothing(margin):
    assert not alerts(GradientMargin(), dict.fromkeys(SPARSE, margin))


def test_optimizers_without_a_limit_are_left_alone():
    unknown = Estimate(3.0, 0.1, status="unknown")
    assert not alerts(GradientMargin(), dict.fromkeys(SPARSE, 50.0), margin=unknown)


def test_only_what_was_measured_now_counts():
    assert not alerts(GradientMargin(), dict.fromkeys(SPARSE, 50.0), gradient_fresh=False)


def test_of_a_single_value_of_a_probe_the_rule_on_its_margin_speaks():
    assert not alerts(GradientMargin(), {50: 95.0}, fresh=True)
    assert alerts(GradientMargin(), dict.fromkeys(SPARSE, 8.0), fresh=True)  # but in the mean


def test_it_resumes_where_it_stopped():
    whole, first, second = GradientMargin(), GradientMargin(), GradientMargin()
    course = {s: 4 + s / 30 for s in SPARSE}
    early = {s: m for s, m in course.items() if s < 80}
    late = {s: m for s, m in course.items() if s >= 80}
    expected = alerts(whole, course)
    found = alerts(first, early)
    second.load_state_dict(first.state_dict())
    assert found + alerts(second, late) == expected
    assert expected
    assert all(math.isfinite(a.value) for a in expected)
