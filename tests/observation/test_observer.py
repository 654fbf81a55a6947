"""What an observer adds to a step from the steps before it."""

from __future__ import annotations

import json

import pytest
from observations import measured

from geomwatch.observation.batch_noise import noise_part
from geomwatch.observation.observer import Observer
from geomwatch.records import Estimate
from geomwatch.rules import Observation


def whole(step: int, margin: float, stochastic: float, **more) -> Observation:
    """A probe that has compared micro-batches."""
    estimates = {
        "stability_margin": Estimate(margin, 0.01, "residual"),
        "stochastic_margin": Estimate(stochastic, 0.1, "stderr"),
    }
    return measured(step, margin, estimates=estimates, **more)


def test_noise_dominates_where_batches_disagree_in_curvature():
    observer = Observer()
    assert observer(measured(0, 0.5)).noise is None
    observer(whole(30, 0.5, 2.0))
    known = observer(measured(31, 0.9))  # a lesser probe says nothing of it
    assert known.noise == pytest.approx(4.0)
    assert known.is_noisy
    assert not known.is_quiet
    assert observer(measured(31, 0.9, same_data=True)).is_noisy is False
    assert observer(measured(90, 0.9)).is_noisy
    assert observer(measured(91, 0.9)).is_noisy is None  # too long ago


def test_batches_that_have_agreed_go_on_to_until_they_clearly_do_not():
    observer = Observer()
    for step, noise, is_quiet in ((30, 1.5, False), (40, 1.2, True), (50, 1.7, True)):
        observer(whole(step, 0.5, 0.5 * noise))
        assert observer(measured(step + 1, 0.5)).is_quiet is is_quiet
    again = Observer()
    again.load_state_dict(json.loads(json.dumps(observer.state_dict())))
    observer(whole(60, 0.5, 0.95))
    again(whole(60, 0.5, 0.85))
    assert not observer(measured(61, 0.5)).is_quiet
    assert again(measured(61, 0.5)).is_quiet


def test_that_they_agreed_is_known_for_ever_and_believed_for_a_while():
    observer = Observer()
    observer(whole(30, 0.5, 0.6))
    late = observer(measured(91, 0.5))
    assert late.agreed
    assert not late.is_quiet


def test_agreement_of_the_first_steps_and_far_below_any_limit_means_nothing():
    for seen in (whole(19, 0.5, 0.5), whole(30, 0.09, 0.09)):
        observer = Observer()
        observer(seen)
        assert not observer(measured(31, 0.5)).is_quiet


def test_a_cap_on_the_rate_does_not_change_how_much_is_noise():
    observer, seen = Observer(), whole(30, 0.5, 0.6)
    known = observer(seen, cap=0.01)
    assert known.lr == (0.1,)
    assert known.margin == seen.margin
    assert known.applied.lr == (0.01,)
    assert known.applied.margin.value == pytest.approx(0.05)
    assert known.noise == pytest.approx(1.2)
    assert known.is_quiet
    assert observer(measured(31, 0.5), cap=0.019).noise is not None
    assert observer(measured(32, 0.5), cap=0.021).noise is None  # at other rates it may be another
    assert observer(measured(33, 0.5), cap=0.021).is_noisy is False  # jumps are judged all the same


def test_under_a_cap_both_margins_are_those_of_the_rate_it_leaves():
    """Else the noise part would be that of one rate less the margin of another."""
    known = Observer()(whole(30, 0.5, 2.0), cap=0.01)
    assert noise_part(known).value == pytest.approx(1.5)
    assert noise_part(known.applied).value == pytest.approx(0.15)
    assert known.applied.measured("stochastic_margin").error == pytest.approx(0.01)


def test_only_the_same_data_at_every_step_is_quiet_from_the_start():
    assert Observer()(measured(1, 1.0, same_data=True)).is_quiet
    assert not Observer()(measured(1, 1.0)).is_quiet


def test_a_jump_is_told_at_the_rates_that_steps_are_taken_with():
    observer = Observer()
    jumps = [observer(measured(t, 0.5, lr=lr), cap).jump for t, (lr, cap) in enumerate(RATES)]
    assert jumps == pytest.approx([1.0, 1.0, 4.0, 1.5, 1.0, 0.1])


# the user's rate, and what it is capped at
RATES = [(0.0, 9.0), (0.1, 9.0), (0.4, 9.0), (2.0, 0.6), (5.0, 0.6), (5.0, 0.06)]


def test_a_step_without_rates_is_no_jump():
    assert Observer()(Observation(0, ())).jump == 1.0


def test_a_margin_is_doubted_at_the_rate_it_is_applied_at():
    unsure = Observation(3, (0.1,), margin=Estimate(0.3, 0.4, "residual"), fresh=True)
    assert "its error 0.4 exceeds the margin 0.3" in Observer()(unsure).doubt
    assert Observer()(unsure, cap=0.02).doubt == ""  # that small it needs no belief
