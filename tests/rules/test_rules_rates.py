"""The rules on rates to come: the planned peak before the first step, and sudden jumps."""

from __future__ import annotations

import json

import pytest
import torch
from observations import brief, heard, measured
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.records import Alert, Estimate
from geomwatch.rules import Observation, PlannedRate, RateJump

# Planned rate


def planned(margin: float, peak: float, *, step: int = 0, lr: float = 0.1, **more) -> Observation:
    return measured(step, margin, lr=lr, peak=(peak,), **more)


def told(margin: float, peak: float, **more) -> list[Alert]:
    """What is said of a plan up to the second step."""
    first = planned(margin, peak, **more)
    return heard(PlannedRate(), [first, measured(first.index + 1, margin)])


def test_a_peak_at_which_the_margin_would_be_five_is_critical():
    assert not told(0.1, 2.9)
    assert brief(told(0.1, 3.1)) == [(0, "warning")]
    (alert,) = told(0.1, 5.1)
    assert (alert.step, alert.severity, alert.limit) == (0, "critical", 5.0)
    assert alert.value == pytest.approx(5.1)


def test_a_peak_far_beyond_is_told_of_at_once_and_others_a_step_later():
    rule = PlannedRate()
    assert rule(planned(0.1, 10.1)) is not None
    assert rule(measured(1, 0.1)) is None
    rule, again = PlannedRate(), PlannedRate()
    assert rule(planned(0.1, 9.9, layers=("head (90%)",))) is None
    again.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    assert again(measured(1, 0.1)) == rule(measured(1, 0.1)) is not None


def test_full_batch_training_reaches_peaks_that_mini_batches_do_not():
    rule = PlannedRate()
    assert rule(planned(0.1, 9.9)) is None
    assert rule(measured(1, 0.1, same_data=True)) is None


def test_the_peak_is_judged_once():
    assert len(heard(PlannedRate(), [planned(0.1, 9.0, step=t) for t in range(20)])) == 1
    late = [planned(0.01, 0.1), *(planned(0.1, 9.0, step=t) for t in range(1, 20))]
    assert not heard(PlannedRate(), late)


def test_a_warm_up_from_zero_is_judged_at_its_first_positive_rate():
    frozen = [planned(0.0, 1.0, step=t, lr=0.0) for t in range(2)]
    first = planned(0.1, 1.0, step=2, lr=0.01)
    alerts = heard(PlannedRate(), [*frozen, first, measured(3, 0.1)])
    assert brief(alerts) == [(2, "critical")]
    assert alerts[0].value == pytest.approx(10.0)


def test_a_constant_rate_has_no_plan():
    assert not heard(PlannedRate(), [planned(8.0, 0.1)])
    assert not heard(PlannedRate(), [measured(0, 8.0)])


def test_the_group_with_the_steepest_plan_counts():
    margin = Estimate(0.1, 0.01, "residual")
    seen = Observation(index=0, lr=(0.1, 0.01), margin=margin, fresh=True, peak=(0.1, 0.6))
    (alert,) = heard(PlannedRate(), [seen, measured(1, 0.1)])
    assert alert.value == pytest.approx(6.0)


@pytest.mark.parametrize("status", ["unknown", "directional"])
def test_without_a_limit_nothing_can_be_planned(status):
    assert not heard(PlannedRate(), [planned(0.1, 99.0, status=status)])


def test_a_plan_that_could_not_be_measured_is_passed_over():
    nothing = Observation(index=0, lr=(0.1,), margin=Estimate(None), fresh=True, peak=(9.0,))
    assert not heard(PlannedRate(), [nothing])


def test_the_message_names_peak_forecast_and_remedy():
    (alert,) = told(0.1, 6.0, layers=("head (90%)",))
    assert alert.message == (
        "Lower the peak of the schedule from 6 to about 1 (0.17 x), or warm up for longer. The "
        "stability margin would be 6 there in the present weights (alert above 5, unstable at 1).\n"
        "It is 0.10 ± 0.01 at the 0.1 of this step with SGD; mostly in layers head (90%). "
        "Curvature may give way during a warm-up, but no peak above 5 trained in the runs behind "
        "this level. More: geomwatch explain planned_rate."
    )


@pytest.mark.parametrize(("peak", "expected"), [(0.1, []), (60.0, ["planned_rate"])])
def test_a_torch_warm_up_is_judged_before_step_zero(peak, expected):
    torch.manual_seed(0)
    model = mlp(64, 16, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9)
    torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=100)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    batch = digits(64)
    cross_entropy(model, batch).backward()
    monitor.step(batch)
    assert [(a.rule, a.step) for a in monitor.alerts] == [(rule, 0) for rule in expected]


# Jumps of the rate


def steady(margin: float, gradient: float, *, items: int = 64, steps: int = 60, **more):
    """Probes at a constant rate, every tenth step."""
    return [jumped(t, margin, gradient, items=items, **more) for t in range(0, steps, 10)]


def jumped(step: int, margin: float, gradient: float, *, lr: float = 0.1, **more) -> Observation:
    seen = {"gradient_margin": Estimate(gradient), "gradient_fresh": True, "items": 64} | more
    return measured(step, margin, lr=lr, **seen)


def after(margin: float, gradient: float, *, factor: float, **more) -> list[Observation]:
    """A jump at step 60 to `factor` x the rate, and so x the margins."""
    jump = jumped(60, factor * margin, factor * gradient, lr=0.1 * factor, **more)
    return [*steady(margin, gradient, **more), jump]


def test_a_jump_beyond_both_limits_is_critical_at_its_step():
    # sqrt(0.1 x 1.6) = 0.4, times 5.5 is 2.2; times 6.5 is 2.6
    assert not heard(RateJump(), after(0.1, 1.6, factor=5.5))
    alerts = heard(RateJump(), after(0.1, 1.6, factor=6.5))
    assert brief(alerts) == [(60, "critical")]
    assert alerts[0].value == pytest.approx(2.6 / 2.4)


def test_what_a_large_batch_survives_breaks_a_small_one():
    assert not heard(RateJump(), after(0.1, 1.6, factor=4, items=64))
    assert brief(heard(RateJump(), after(0.1, 1.6, factor=4, items=8))) == [(60, "critical")]


def test_methods_that_adapt_survive_more():
    def adaptive(factor: float) -> list[Observation]:
        return [
            Observation(**{**fields(seen), "adaptive": True})
            for seen in after(0.1, 1.6, factor=factor)
        ]

    assert not heard(RateJump(), adaptive(12))
    assert brief(heard(RateJump(), adaptive(13))) == [(60, "critical")]


def fields(seen: Observation) -> dict[str, object]:
    return {name: getattr(seen, name) for name in seen.__slots__}


def test_a_margin_above_two_is_too_much_for_any_batch():
    assert not heard(RateJump(), after(0.1, 0.1, factor=19, items=10**6))
    assert heard(RateJump(), after(0.1, 0.1, factor=21, items=10**6))


def test_the_edge_of_stability_takes_jumps_better():
    assert not heard(RateJump(), after(0.1, 9.0, factor=21, same_data=True))
    assert heard(RateJump(), after(0.1, 9.0, factor=23, same_data=True))


def both_margins(margin: float, mean_square: float) -> dict[str, Estimate]:
    return {
        "stability_margin": Estimate(margin, 0.01, "residual"),
        "stochastic_margin": Estimate(mean_square, 0.01, "stderr"),
    }


@pytest.mark.parametrize(("mean_square", "breaks"), [(0.15, 13), (0.4, 6.5)])
def test_where_batches_agree_in_curvature_the_margin_alone_counts(mean_square, breaks):
    whole = {"estimates": both_margins(0.1, mean_square)}
    first = jumped(25, 0.1, 1.6, **whole)
    assert not heard(RateJump(), [first, *after(0.1, 1.6, factor=breaks - 2)])
    assert heard(RateJump(), [first, *after(0.1, 1.6, factor=breaks)])


def test_methods_that_adapt_survive_more_where_batches_agree_too():
    whole = {"estimates": both_margins(0.1, 0.15)}
    run = [jumped(25, 0.1, 1.6, **whole), *after(0.1, 1.6, factor=13)]
    adaptive = [Observation(**{**fields(seen), "adaptive": True}) for seen in run]
    assert heard(RateJump(), run)
    assert not heard(RateJump(), adaptive)


@pytest.mark.parametrize(
    ("adaptive", "margin", "noise", "speaks"),
    [
        (False, 0.5, 6.9, False),
        (False, 0.5, 7.1, True),
        (False, 1.15, 1.1, False),
        (False, 1.25, 1.1, True),
        (True, 0.5, 11.9, False),
        (True, 0.5, 12.1, True),
        (True, 1.95, 1.1, False),
        (True, 2.05, 1.1, True),
    ],
)
def test_micro_batches_measured_at_the_jump_decide(adaptive, margin, noise, speaks):
    # along the gradient it would be harmless, or an emergency
    before, after = {"adaptive": adaptive}, {"adaptive": adaptive}
    after["estimates"] = both_margins(margin, margin * noise)
    run = [jumped(50, margin / 8, 0.0, lr=0.1, **before)]
    run.append(jumped(51, margin, 100.0 * (not speaks), lr=0.8, **after))
    found = heard(RateJump(), run)
    assert brief(found) == ([(51, "critical")] if speaks else [])
    if speaks and noise > 2:
        assert f"stochastic margin {margin * noise:.2g}, alert above" in found[0].message


def test_a_cap_lowers_what_micro_batches_have_measured():
    # 8 x 0.5 at the user's rate, a tenth of that as applied
    applied = jumped(51, 0.05, 0.1, lr=0.08, estimates=both_margins(0.5, 4.0))
    assert not heard(RateJump(), [jumped(50, 0.01, 0.1, lr=0.01), applied])


def test_a_rate_that_rises_by_less_than_half_a_doubling_is_no_jump():
    rates = [0.1 * 1.9**t for t in range(12)]
    run = [jumped(t, lr, 10 * lr, lr=lr) for t, lr in enumerate(rates)]
    assert not heard(RateJump(), run)


def test_without_a_probe_at_the_step_the_levels_are_twice_as_high():
    def held(factor: float) -> list[Observation]:
        return [*steady(0.1, 1.6), Observation(60, (0.1 * factor,), "SGD", Estimate(9.0))]

    assert not heard(RateJump(), held(11))
    (alert,) = heard(RateJump(), held(13))
    assert "from earlier probes, re-scaled" in alert.message


def test_nothing_is_known_before_the_first_probe():
    run = [Observation(0, (0.1,)), Observation(1, (9.0,), margin=Estimate(99.0))]
    assert not heard(RateJump(), run)


def test_a_rate_that_starts_from_zero_is_no_jump():
    run = [measured(0, 0.0, lr=0.0), jumped(1, 9.0, 90.0, lr=1.0)]
    assert not heard(RateJump(), run)


def test_one_odd_batch_is_averaged_away():
    odd = jumped(60, 3.0, 10.0, lr=0.4)
    assert not heard(RateJump(), [*steady(0.05, 0.2), odd])


def test_a_second_jump_is_news_after_a_calm_time():
    def jump_at(step: int) -> list[Observation]:
        return [jumped(step, 3.0, 48.0, lr=3.0), jumped(step + 1, 0.1, 1.6)]

    calm = [jumped(t, 0.1, 1.6) for t in range(80, 120, 5)]
    run = [*steady(0.1, 1.6), *jump_at(60), *calm, *jump_at(120)]
    assert brief(heard(RateJump(), run)) == [(60, "critical"), (120, "critical")]


def test_the_message_of_a_jump_says_how_far_and_what_instead():
    (alert,) = heard(RateJump(), after(0.1, 1.6, factor=12))
    assert alert.message == (
        "Lower the learning rate from 1.2 to about 0.3 (0.25 x), or reach it by a warm-up of some "
        "hundred steps. It jumps, with this step, 12 x to 2 x what SGD is likely to survive.\n"
        "This step is not taken yet: margin 1.2 and 19 along the gradient, mean 4.8, alert above "
        "2.4 at 64 items (measured at this step). More: geomwatch explain rate_jump."
    )
