"""The rule on gradient norms."""

from __future__ import annotations

import math
import random

import pytest
from observations import brief, heard

from geomwatch.observation.step import Settled
from geomwatch.rules import GradNormSpike, Observation


def norms(values, start: int = 0, **more) -> list[Observation]:
    return [
        Observation(
            index=start + t + 1, lr=(0.1,), settled=Settled(start + t, 1.0, g, True), **more
        )
        for t, g in enumerate(values)
    ]


def healthy(seed: int, steps: int, spread: float = 0.5) -> list[float]:
    """Norms that fall by a factor of 50, with the tail of small batches."""
    rng = random.Random(seed)
    return [math.exp(rng.gauss(0, spread) - 4 * t / steps) for t in range(steps)]


def flat(steps: int) -> list[float]:
    rng = random.Random(0)
    return [0.1 * math.exp(rng.gauss(0, 0.1)) for _ in range(steps)]


@pytest.mark.parametrize("seed", range(20))
def test_the_norms_of_small_batches_are_quiet(seed):
    assert not heard(GradNormSpike(), norms(healthy(seed, 1000)))


def test_one_norm_far_outside_is_information():
    alerts = heard(GradNormSpike(), norms([*flat(200), 9.0, *flat(100)]))
    assert brief(alerts) == [(200, "info")]
    assert alerts[0].value == 9.0
    assert 0.1 < alerts[0].limit < 1.0


def test_five_in_a_row_are_a_warning():
    run = flat(200)
    assert brief(heard(GradNormSpike(), norms([*run, *[9.0] * 4]))) == [(200, "info")]
    assert brief(heard(GradNormSpike(), norms([*run, *[9.0] * 9]))) == [
        (200, "info"),
        (204, "warning"),
    ]


def test_the_spikes_of_full_batch_training_are_no_warning():
    run = norms([*[0.1] * 200, *[9.0] * 20], same_data=True)
    assert brief(heard(GradNormSpike(), run)) == [(200, "info")]


def test_a_steady_growth_is_no_spike():
    assert not heard(GradNormSpike(), norms(1.01**t for t in range(800)))


def test_nearly_equal_norms_make_no_outlier_of_a_small_change():
    assert not heard(GradNormSpike(), norms([*[1.0] * 100, *[2.0] * 100]))


def test_the_first_thirty_norms_are_spared():
    assert not heard(GradNormSpike(), norms([*[1.0] * 28, 1e6]))
    assert heard(GradNormSpike(), norms([*[1.0] * 32, 1e6]))


def test_a_new_level_becomes_the_usual_one():
    run = [*[1.0] * 100, *[50.0] * 400, *[2500.0] * 2]
    assert [a.step for a in heard(GradNormSpike(), norms(run))] == [100, 104, 500]


@pytest.mark.parametrize("norm", [math.inf, math.nan, 0.0])
def test_norms_that_have_no_logarithm_are_left_to_other_rules(norm):
    assert not heard(GradNormSpike(), norms([*[1.0] * 50, norm, *[1.0] * 50]))


def test_the_message_says_where_to_clip():
    (alert,) = heard(GradNormSpike(), norms([*[1.0] * 50, 20.0]))
    assert alert.message == (
        "the gradient norm is 20, 20 x the median of the last 50 (1), z = 30.0 on their logarithms "
        "(alert above 8). A single one is mostly a bad batch: look at it, or clip at about 1 so "
        "that none can do harm. More: geomwatch explain grad_norm_spike."
    )
