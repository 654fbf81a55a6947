"""The rules on observations made by hand: when they speak, how often, and what they say."""

from __future__ import annotations

import io
import itertools
import json
import math
import random
import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from observations import (
    Watched,
    brief,
    full_batch,
    heard,
    judged,
    losses,
    measured,
    random_run,
    trained,
)

from geomwatch.observation.step import Settled
from geomwatch.records import Estimate
from geomwatch.rules import (
    BadBatch,
    BatchNoise,
    CriticalBatchSize,
    FlatButRough,
    GradientMargin,
    GradNormSpike,
    Headroom,
    LossRise,
    NonFinite,
    NoProgress,
    Observation,
    PlannedRate,
    RateJump,
    StabilityMargin,
    TakenStep,
    UntrustedProbe,
    default_rules,
)

SENSITIVE = partial(StabilityMargin, warning=0.8)  # so that a warning is not critical soon

# Stability margin: mini-batch training


def test_a_margin_below_the_level_is_healthy():
    assert not heard(StabilityMargin(), (measured(t, 0.99) for t in range(0, 500, 5)))


def test_a_margin_above_its_limit_is_warned_of_once_and_critical_if_it_lasts():
    alerts = heard(StabilityMargin(), (measured(t, 1.01) for t in range(20, 500, 4)))
    assert brief(alerts) == [(24, "warning"), (28, "critical")]
    assert alerts[0].value == pytest.approx(1.01)
    assert alerts[0].limit == 1


def test_one_measurement_alone_does_not_warn():
    assert not heard(StabilityMargin(), [measured(20, 1.5)])
    assert not heard(StabilityMargin(), [measured(20, 1.5), measured(120, 0.3), measured(220, 0.3)])


def test_two_measurements_warn_however_far_apart_they_are():
    assert brief(heard(SENSITIVE(), [measured(20, 0.95), measured(22, 0.95)])) == [(22, "warning")]
    assert brief(heard(SENSITIVE(), [measured(100, 0.95), measured(200, 0.95)])) == [
        (200, "warning")
    ]


def test_one_outlier_is_averaged_away():
    margins = itertools.cycle([0.2, 0.2, 1.9])
    assert not heard(StabilityMargin(), (measured(t, next(margins)) for t in range(20, 300, 5)))


def test_a_warning_becomes_critical_once():
    alerts = heard(StabilityMargin(), (measured(t, 1.1) for t in range(20, 300)))
    assert brief(alerts) == [(21, "warning"), (25, "critical")]
    assert alerts[1].limit == 1.0


def test_persistence_is_counted_in_steps_and_not_in_probes():
    dense = [measured(t, 1.1) for t in (20, 21, 22, 23, 24)]
    assert brief(heard(StabilityMargin(), dense)) == [(21, "warning")]
    assert brief(heard(StabilityMargin(), [dense[0], measured(25, 1.1)])) == [(25, "critical")]


def test_a_measurement_below_the_level_starts_the_persistence_again():
    margins = {20: 1.1, 22: 1.1, 24: 0.6, 26: 1.1, 28: 1.1}
    alerts = heard(StabilityMargin(), (measured(t, m) for t, m in margins.items()))
    assert brief(alerts) == [(22, "warning")]


def test_one_measurement_far_above_is_critical_at_once():
    alerts = heard(StabilityMargin(), [measured(1, 2.6)])
    assert brief(alerts) == [(1, "critical")]
    assert alerts[0].limit == 2.5
    assert not heard(StabilityMargin(), [measured(1, 2.4)])


def test_critical_is_possible_before_warnings_are():
    alerts = heard(StabilityMargin(), (measured(t, 1.1) for t in range(1, 9)))
    assert brief(alerts) == [(6, "critical")]


def test_the_first_ten_steps_are_spared_warnings():
    assert brief(heard(SENSITIVE(), (measured(t, 0.95) for t in range(30)))) == [(10, "warning")]


def test_before_the_first_step_only_a_margin_above_ten_counts():
    assert not heard(StabilityMargin(), [measured(0, 9.9)])
    alerts = heard(StabilityMargin(), [measured(0, 10.1)])
    assert brief(alerts) == [(0, "critical")]
    assert alerts[0].limit == 10


def test_earlier_measurements_count_at_the_present_learning_rate():
    before = [measured(20, 0.475, lr=0.1), measured(25, 0.475, lr=0.1)]
    alerts = heard(SENSITIVE(), [*before, measured(30, 0.95, lr=0.2)])
    assert brief(alerts) == [(30, "warning")]
    assert alerts[0].value == pytest.approx(0.95)


def test_the_mean_is_geometric_and_over_the_last_three_measurements():
    margins = {20: 0.01, 25: 0.7, 30: 0.8, 35: 1.1}
    alerts = heard(SENSITIVE(), (measured(t, m) for t, m in margins.items()))
    assert brief(alerts) == [(35, "warning")]
    assert alerts[0].value == pytest.approx(statistics.geometric_mean([0.7, 0.8, 1.1]))


def test_measurements_older_than_sixty_steps_are_not_averaged():
    alerts = heard(SENSITIVE(), [measured(20, 0.01), measured(81, 0.95), measured(82, 0.95)])
    assert alerts[0].value == pytest.approx(0.95)
    assert not heard(SENSITIVE(), [measured(20, 0.01), measured(80, 0.95)])


def test_a_held_margin_never_raises_an_alert():
    rule = StabilityMargin()
    held = Observation(index=30, lr=(3.0,), margin=Estimate(50.0, 0.1, "residual"))
    assert not heard(rule, [measured(20, 0.4)] + [held] * 100)


def test_a_margin_that_could_not_be_measured_is_passed_over():
    nothing = Observation(index=30, lr=(0.1,), margin=Estimate(None, reason="no"), fresh=True)
    alerts = heard(SENSITIVE(), [measured(28, 0.95), nothing, measured(32, 0.95)])
    assert brief(alerts) == [(32, "warning")]


def test_a_warm_up_that_starts_at_rate_zero_does_not_dull_the_rule():
    start = [measured(10, 0.0, lr=0.0)]
    alerts = heard(SENSITIVE(), [*start, measured(11, 0.95), measured(12, 0.95)])
    assert brief(alerts) == [(12, "warning")]
    assert alerts[0].value == pytest.approx(0.95)


def test_a_restart_from_a_tiny_rate_is_no_cause_for_alarm():
    # A cosine schedule that ends near zero and starts again: the curvature is what it was.
    rates = [0.1, 1e-8, 0.1, 0.1, 0.1]
    run = [measured(500 + i, 3 * lr, lr=lr) for i, lr in enumerate(rates)]
    assert not heard(StabilityMargin(), run)


def test_negative_curvature_is_no_cause_for_alarm():
    margins = itertools.cycle([-0.5, 0.9, -3.0])
    assert not heard(StabilityMargin(), (measured(t, next(margins)) for t in range(20, 200, 5)))


# Hysteresis, release and cool-down


def phases(*parts: tuple[int, float]) -> list[Observation]:
    """A measurement at each step from 20: so many steps at such a margin, and so on."""
    margins = [margin for length, margin in parts for _ in range(length)]
    return [measured(20 + t, margin) for t, margin in enumerate(margins)]


def test_a_margin_that_hovers_about_the_level_is_warned_of_once():
    rng = random.Random(0)
    hovering = (measured(t, rng.uniform(0.6, 0.99)) for t in range(20, 2000, 3))
    assert [a.severity for a in heard(SENSITIVE(), hovering)] == ["warning"]


def test_an_alert_is_over_after_fifteen_calm_steps_and_may_come_back_after_a_cool_down():
    # the mean is calm from 30 (0.95, 0.95, 0.1: 0.45) to 45 (0.1, 0.95, 0.95); silent until 70
    alerts = heard(SENSITIVE(), phases((10, 0.95), (14, 0.1), (60, 0.95)))
    assert brief(alerts) == [(21, "warning"), (70, "warning")]


def test_fourteen_calm_steps_are_not_enough():
    alerts = heard(SENSITIVE(), phases((10, 0.95), (13, 0.1), (200, 0.95)))
    assert brief(alerts) == [(21, "warning")]


def test_calm_steps_must_follow_one_another():
    alerts = heard(SENSITIVE(), phases((10, 0.95), (8, 0.1), (6, 0.7), (8, 0.1), (99, 0.95)))
    assert brief(alerts) == [(21, "warning")]


def test_release_is_counted_in_steps_and_not_in_probes():
    sparse = [measured(20, 0.95), measured(21, 0.95), measured(100, 0.1), measured(120, 0.1)]
    again = [measured(200, 0.95), measured(201, 0.95)]
    assert brief(heard(SENSITIVE(), sparse + again)) == [(21, "warning"), (201, "warning")]


def test_a_margin_just_below_the_level_does_not_release_the_alert():
    alerts = heard(SENSITIVE(), phases((10, 0.95), (300, 0.7), (100, 0.95)))
    assert brief(alerts) == [(21, "warning")]


def test_critical_ignores_the_cool_down():
    alerts = heard(SENSITIVE(), phases((10, 0.95), (17, 0.1), (1, 2.6)))
    assert brief(alerts) == [(21, "warning"), (47, "critical")]


# Stability margin: the same data at every step


@pytest.mark.parametrize("seed", range(5))
def test_the_edge_of_stability_is_information_once_and_no_warning(seed):
    rng = random.Random(seed)
    losses = (math.exp(-t / 200) + rng.uniform(0, 0.05) for t in itertools.count())
    run = (full_batch(t, rng.uniform(0.91, 1.29), loss=next(losses)) for t in range(1, 501))
    alerts = heard(StabilityMargin(), run)
    assert [a.severity for a in alerts] == ["info"]
    assert "no action needed" in alerts[0].message


def test_below_the_edge_there_is_nothing_to_tell():
    assert not heard(StabilityMargin(), (full_batch(t, 0.89) for t in range(500)))
    assert brief(heard(StabilityMargin(), (full_batch(t, 0.91) for t in range(500)))) == [
        (1, "info")
    ]


def test_a_catapult_out_of_sharp_weights_is_no_warning():
    margins = {0: 2.75, 1: 2.4, 2: 2.1, 3: 1.8, 5: 1.3, 8: 1.0, 13: 0.95}
    losses = [1.28, 1.6, 1.9, 1.5, 1.2, 1.1, 1.0]
    first, *rest = margins.items()
    # the first probe can't know yet that the data stay the same
    run = [measured(*first, loss=losses[0])]
    run += [full_batch(t, m, loss=x) for (t, m), x in zip(rest, losses[1:], strict=True)]
    assert [a.severity for a in heard(StabilityMargin(), run)] == ["info"]


def test_a_catapult_with_a_rising_loss_is_spared_for_ten_steps():
    # a real run that trained well: 2.0 to 2.2 for eight steps
    margins = {0: 2.02, 1: 2.21, 2: 2.2, 3: 2.18, 5: 2.04, 8: 1.82, 13: 1.02, 21: 1.12}
    losses = [1.29, 1.63, 2.32, 2.4, 2.5, 2.6, 1.1, 0.9]
    run = [full_batch(t, m, loss=x) for (t, m), x in zip(margins.items(), losses, strict=True)]
    assert [a.severity for a in heard(StabilityMargin(), run)] == ["info"]
    assert brief(heard(StabilityMargin(), [full_batch(3, 3.1)])) == [(3, "critical")]


def test_beyond_the_edge_a_rising_loss_is_warned_of():
    rising = (full_batch(t, 1.5, loss=1 + t / 100) for t in range(20, 100, 5))
    alerts = heard(StabilityMargin(), rising)
    assert brief(alerts) == [(25, "warning")]
    assert alerts[0].limit == 1.3
    falling = (full_batch(t, 1.5, loss=1 / t) for t in range(20, 100, 5))
    assert not heard(StabilityMargin(), [measured(0, 1.5, loss=2.0), *falling])


def test_far_beyond_the_edge_is_critical():
    rising = (full_batch(t, 2.1, loss=1 + t / 100) for t in range(20, 40))
    assert brief(heard(StabilityMargin(), rising)) == [(21, "warning"), (25, "critical")]
    falling = (full_batch(t, 3.1, loss=1 / t) for t in range(1, 20))
    assert brief(heard(StabilityMargin(), falling)) == [(1, "critical")]


# Stability margin: optimizers without a formula


def unknown(step: int, margin: float, loss: float, **more) -> Observation:
    return measured(step, margin, loss=loss, status="unknown", **more)


def test_an_unknown_optimizer_is_held_against_its_own_past():
    usual = [unknown(10 * t, 0.01, 1.0) for t in range(5)]
    unusual = [unknown(50, 0.03, 1.6), unknown(55, 0.03, 1.6), unknown(60, 0.03, 1.6)]
    alerts = heard(StabilityMargin(), usual + unusual)
    assert brief(alerts) == [(55, "warning")]
    assert alerts[0].limit == pytest.approx(0.02)
    assert "no stability limit is known for SGD" in alerts[0].message


def test_nothing_is_usual_before_five_measurements():
    usual = [unknown(10 * t, 0.01, 1.0) for t in range(4)]
    assert not heard(StabilityMargin(), [*usual, unknown(40, 0.03, 1.6)])
    # the first of them counts as the fifth measurement; the wait begins with the second
    late = [unknown(40, 0.03, 1.6), unknown(45, 0.03, 1.6), unknown(50, 0.03, 1.6)]
    assert brief(heard(StabilityMargin(), usual + late)) == [(50, "warning")]


def test_curvature_that_grows_while_the_loss_falls_is_healthy():
    rule = StabilityMargin()
    sharpening = (unknown(t, 1e-3 * math.exp(t / 60), math.exp(-t / 100)) for t in range(0, 500, 9))
    assert not heard(rule, sharpening)


def test_the_warm_up_of_an_unknown_optimizer_is_healthy():
    def rate(t: int) -> float:
        return 1e-3 * min(1, t / 300)

    rule, rng = StabilityMargin(), random.Random(1)
    probes = (0, 1, 2, 3, 5, 8, 10, 12, 15, 18, 22, 27, 33, 40, 48, 58, 70, 85, 102, 123, 148, 180)
    run = [unknown(t, 20 * rate(t), 2.3 - t / 200 + rng.uniform(0, 0.3)) for t in probes]
    assert not heard(rule, run)


def test_a_hard_batch_alone_does_not_make_an_unknown_optimizer_suspicious():
    losses = itertools.cycle([1.0, 1.0, 1.0, 3.0])
    assert not heard(StabilityMargin(), (unknown(9 * t, 0.01, next(losses)) for t in range(200)))


def test_a_new_usual_is_learnt_from_the_last_twenty_measurements():
    levels = [(0.01, 1.0)] * 20 + [(0.05, 2.0)] * 60 + [(0.2, 4.0)] * 60
    run = (unknown(10 * t, *level) for t, level in enumerate(levels))
    alerts = heard(StabilityMargin(), run)
    assert brief(alerts) == [(210, "warning"), (810, "warning")]
    assert [a.limit for a in alerts] == pytest.approx([0.02, 0.1])


def test_a_run_that_has_had_no_curvature_has_no_usual():
    flat = [unknown(t, 0.0, 1.0, lr=0.0) for t in range(10)]
    assert not heard(StabilityMargin(), flat + [unknown(t, 0.5, 2.0) for t in range(10, 30)])


# NaN and Inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_critical_once(value):
    lost = [trained(5 + t, value, grad_norm=value) for t in range(50)]
    alerts = heard(NonFinite(), [trained(t, 1.0) for t in range(5)] + lost)
    assert brief(alerts) == [(5, "critical")]
    assert str(value) in alerts[0].message


def test_a_loss_that_only_the_probe_sees_is_critical_at_the_step_to_come():
    run = [
        Observation(index=7, lr=(0.1,), loss=math.nan, settled=Settled(6, None, 1.0, True)),
        trained(7, math.nan, grad_norm=math.nan),
    ]
    assert brief(heard(NonFinite(), run)) == [(7, "critical")]


def test_a_step_left_out_is_information():
    alerts = heard(NonFinite(), [trained(3, 1.0, grad_norm=math.inf, stepped=False)])
    assert brief(alerts) == [(3, "info")]
    assert "No action needed" in alerts[0].message


def test_five_steps_left_out_in_a_row_are_critical():
    run = [trained(3, 1.0, grad_norm=math.inf, stepped=False)] * 10
    alerts = heard(NonFinite(), run[:4])
    assert [a.severity for a in alerts] == ["info"]
    alerts = heard(NonFinite(), run)
    assert [a.severity for a in alerts] == ["info", "critical"]
    assert alerts[1].message.startswith("5 steps in a row")


def test_a_step_that_is_taken_ends_the_row():
    run = []
    for step in (0, 2, 4):
        run += [trained(step, 1.0, grad_norm=math.inf, stepped=False)] * 4
        run += [trained(step, 1.0), trained(step + 1, 1.0)]
    assert brief(heard(NonFinite(), run)) == [(0, "info"), (2, "info"), (4, "info")]


def test_a_step_taken_with_an_infinite_gradient_is_critical():
    alerts = heard(NonFinite(), [trained(t, 1.0, grad_norm=math.nan) for t in range(9)])
    assert brief(alerts) == [(0, "critical")]
    assert "the weights are lost" in alerts[0].message


def test_after_a_recovery_the_next_nan_is_news():
    run = losses([1.0, math.nan, math.nan, 1.0, 1.0, 1.0, math.nan])
    assert brief(heard(NonFinite(), run)) == [(1, "warning"), (6, "warning")]


# Memory


def unchanged(states: object) -> object:
    return states


def through_json(states: object) -> object:
    return json.loads(json.dumps(states, allow_nan=False))


def through_a_checkpoint(states: object) -> object:
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carry", [unchanged, through_json, through_a_checkpoint])
def test_a_resumed_run_raises_the_same_alerts(carry: Callable):
    cuts = random.Random(0)
    after_the_cut: dict[str, int] = {}
    for seed, _ in itertools.product(range(40), range(4)):
        run = random_run(seed)
        cut = cuts.randrange(1, len(run))
        whole = judged(Watched(*default_rules()), run)
        first, second = Watched(*default_rules()), Watched(*default_rules())
        before = judged(first, run[:cut])
        second.load_state_dict(carry(first.state_dict()))
        after = judged(second, run[cut:])
        assert before + after == whole
        for rule in second.rules:
            count = sum(f"rule={rule.name!r}" in text for text in after)
            after_the_cut[rule.name] = after_the_cut.get(rule.name, 0) + count
    after_the_cut.pop("batch_noise")  # of the first steps alone
    assert min(after_the_cut.values()) >= 40, after_the_cut


@pytest.mark.parametrize(
    "run",
    [
        [full_batch(t, 1.5, loss=20 / t) for t in range(20, 60, 5)],
        [measured(t, 0.6) for t in range(100, 900, 100)],
        [unknown(t, 0.01 if t < 60 else 0.03, 1.0 if t < 60 else 2.0) for t in range(0, 90, 2)],
        losses([1.0] * 5 + [0.1] * 60 + [0.6] * 12),
        [trained(3, 1.0, grad_norm=math.inf, stepped=False)] * 8,
    ],
)
def test_it_does_not_matter_where_a_run_is_cut(run):
    whole = judged(Watched(*default_rules()), run)
    for cut in range(len(run)):
        first, second = Watched(*default_rules()), Watched(*default_rules())
        before = judged(first, run[:cut])
        second.load_state_dict(first.state_dict())
        assert before + judged(second, run[cut:]) == whole


def test_a_rule_without_its_memory_judges_otherwise():
    # else the test above would show nothing
    differs = 0
    for seed in range(40):
        run = random_run(seed)
        first, second = Watched(*default_rules()), Watched(*default_rules())
        whole = judged(Watched(*default_rules()), run)
        differs += judged(first, run[:80]) + judged(second, run[80:]) != whole
    assert differs >= 30


def test_every_monitor_gets_rules_of_its_own():
    one, other = default_rules(), default_rules()
    assert {type(rule) for rule in one} == {
        NonFinite,
        BadBatch,
        NoProgress,
        LossRise,
        StabilityMargin,
        GradientMargin,
        BatchNoise,
        PlannedRate,
        RateJump,
        GradNormSpike,
        FlatButRough,
        CriticalBatchSize,
        UntrustedProbe,
        Headroom,
        TakenStep,
    }
    assert all(a is not b for a, b in itertools.product(one, other))


# Words


def test_a_warning_says_the_number_the_limit_where_and_what_to_do():
    estimates = {"lambda_max": Estimate(70.0, 0.4, "residual")}
    run = [
        measured(20, 0.8, lr=0.2, estimates=estimates, layers=("features.0 (61%)", "head (20%)")),
        measured(25, 0.9, lr=0.2, estimates=estimates, layers=("features.0 (61%)", "head (20%)")),
    ]
    (alert,) = heard(SENSITIVE(), run)
    assert alert.message == (
        "Lower the learning rate from 0.2 to about 0.089 (0.44 x), or end its warm-up there. The "
        "stability margin is 0.85 over the last 2 probes, 0.90 ± 0.01 now (alert above 0.8, "
        "unstable at 1).\n"
        "The rate comes close to what the curvature allows for SGD; λ_max 70.0 ± 0.4, stable below "
        "77.8 at this rate; mostly in layers features.0 (61%), head (20%). More: "
        "geomwatch explain stability_margin."
    )
    assert alert.layers == ("features.0 (61%)", "head (20%)")


def test_a_single_measurement_is_judged_by_its_own_level():
    (alert,) = heard(StabilityMargin(), [measured(3, 4.0, lr=0.2)])
    assert alert.message == (
        "Start again at a learning rate of about 0.02 (0.1 x) instead of 0.2, or end its warm-up "
        "there. The stability margin is 4.00 ± 0.01 (alert above 2.5, unstable at 1).\n"
        "The rate is beyond what the curvature allows for SGD. More: geomwatch explain "
        "stability_margin."
    )


def test_a_warning_of_full_batch_training_names_the_rising_loss_and_aims_below_the_edge():
    run = [full_batch(20, 1.6, loss=1.0), full_batch(25, 1.6, loss=1.1)]
    (*_, alert) = heard(StabilityMargin(), run)
    assert "The stability margin is 1.60" in alert.message
    assert ", and the loss rises." in alert.message
    assert "(0.5 x)" in alert.message


def test_an_old_lambda_max_is_not_quoted():
    estimates = {"lambda_max": Estimate(70.0, 0.4, "residual", status="held", age=40)}
    run = [measured(t, 1.1, estimates=estimates) for t in (20, 24)]
    (alert,) = heard(StabilityMargin(), run)
    assert "λ_max" not in alert.message


@pytest.mark.parametrize(
    ("rule", "run", "parts"),
    [
        (
            LossRise(),
            losses([1.0] * 50 + [3.0] * 9),
            [
                "risen to 1.976 from its lowest 1",
                "alert above 1",
                "the first was 1)",
                "start again, at a learning rate of",
            ],
        ),
        (
            StabilityMargin(),
            [unknown(10 * t, 0.01, 1.0) for t in range(9)]
            + [unknown(100, 0.03, 2.0)] * 1
            + [unknown(110, 0.03, 2.0)],
            ["risen to 0.03, 3.0 times its median", "the loss to 2 from", "above 1.5", "Lower the"],
        ),
        (
            NonFinite(),
            [trained(90, math.nan, grad_norm=math.nan)],
            ["batch of step 90 is nan", "the weights are lost", "earlier checkpoint"],
        ),
        (
            NonFinite(),
            [trained(90, 1.0, grad_norm=math.inf)],
            ["the gradient norm is inf", "stepped with it", "earlier checkpoint"],
        ),
        (
            NonFinite(),
            [trained(0, 1.0, grad_norm=math.inf, stepped=False)] * 5,
            ["5 steps in a row", "norm of inf", "last checkpoint", "bfloat16"],
        ),
    ],
)
def test_every_message_says_what_was_seen_and_what_to_do(rule, run, parts):
    message = heard(rule, run)[-1].message
    assert [part for part in parts if part not in message] == [], message
