"""When probes are due: exactly so many, or dense when it matters; from steps and margins only."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable

import pytest
import torch
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.monitoring.schedule import AdaptiveSchedule, make_schedule

Course = Callable[[int], float]


def calm(step: int) -> float:
    return 0.1


def walk(
    schedule: AdaptiveSchedule,
    steps: range,
    *,
    margin: Course = calm,
    rate: Course = calm,
    last: tuple[float, float] | None = None,
) -> list[int]:
    """Ask as a monitor does: the margin of the last probe is held, re-scaled to the rate now."""
    probed = []
    for step in steps:
        lr_ratio = 1.0 if last is None else rate(step) / last[1]
        held = None if last is None else last[0] * lr_ratio
        if schedule.due(step, lr_ratio=lr_ratio, margin=held):
            last = (margin(step), rate(step))
            schedule.probed(step, margin=last[0])
            probed.append(step)
    return probed


def gaps(steps: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(steps)]


# Fixed


@pytest.mark.parametrize(("every", "steps"), [(1, 7), (3, 30), (3, 31), (10, 9), (7, 50), (50, 50)])
def test_the_fixed_schedule_gives_exactly_its_records(every, steps):
    model, batch = mlp(64, 4, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with geomwatch.Monitor(
        model, cross_entropy, optimizer, every=every, schedule="fixed", quantities=["loss"]
    ) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
    assert [r.step for r in monitor.history] == list(range(0, steps, every))
    assert len(monitor.history) == math.ceil(steps / every)


def test_the_fixed_schedule_heeds_neither_margin_nor_rate():
    schedule = make_schedule("fixed", 20)
    wild = walk(schedule, range(100), margin=lambda t: 2.0 * t, rate=lambda t: 0.1 * 1.5**t)
    assert wild == [0, 20, 40, 60, 80]


# Adaptive


def test_the_start_is_dense():
    assert walk(AdaptiveSchedule(100), range(9)) == [0, 1, 2, 3, 5, 8]


def test_the_interval_then_grows_to_that_of_a_calm_run():
    between = gaps(walk(AdaptiveSchedule(100), range(2000))[5:])
    assert between[:-10] == sorted(between[:-10])
    assert all(b <= 1.6 * a + 1 for a, b in itertools.pairwise(between))
    assert between[-10:] == [100] * 10


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7, 20, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_two_probes_are_never_further_apart_than_every(every, seed):
    rng = random.Random(seed)
    course = {t: math.exp(rng.gauss(-1, 1)) for t in range(6 * every + 50)}
    probed = walk(AdaptiveSchedule(every), range(len(course)), margin=course.__getitem__)
    assert max(gaps(probed)) <= every
    assert probed[0] == 0


def test_a_calm_run_costs_little_more_than_the_fixed_schedule():
    probed = walk(AdaptiveSchedule(100), range(5000))
    assert len(probed) <= 50 + 12


def test_a_rising_margin_makes_probes_denser():
    rising = walk(
        AdaptiveSchedule(100), range(1500), margin=lambda t: 0.1 * 1.005 ** max(0, t - 900)
    )
    assert max(gaps([t for t in rising if t <= 900])[-2:]) == 100
    # The margin reaches 0.25 at step 1084, the first warning level at 1223 and 0.6 at 1260.
    late = gaps([t for t in rising if t > 1260])
    assert max(late) <= 30
    assert min(late) == 5
    first_warning = [t for t in rising if t > 1223]
    assert first_warning[1] <= 1223 + 60  # two measurements: what a warning takes


def test_a_margin_that_jumps_to_the_limit_is_followed_every_few_steps():
    jumping = walk(AdaptiveSchedule(100), range(3000), margin=lambda t: 0.1 if t < 1000 else 0.8)
    seen = next(t for t in jumping if t >= 1000)
    assert [t - seen for t in jumping if t >= seen][:2] == [0, 5]


def test_a_low_margin_may_rise_unattended():
    # from 0.001 to 0.22
    rising = walk(AdaptiveSchedule(100), range(2700), margin=lambda t: 0.001 * 1.002**t)
    assert gaps(rising)[-10:] == [100] * 10


def test_a_high_margin_that_holds_still_lets_the_probes_thin_out():
    level = walk(AdaptiveSchedule(100), range(3000), margin=lambda t: 0.1 if t < 300 else 0.7)
    assert gaps(level)[-10:] == [100] * 10


@pytest.mark.parametrize(("margin", "jump", "probes"), [(0.1, 1.6, True), (0.1, 1.4, False)])
def test_a_jump_of_the_rate_is_probed_at_once(margin, jump, probes):
    jumped = walk(
        AdaptiveSchedule(100),
        range(1000),
        margin=lambda t: margin,
        rate=lambda t: 0.1 if t < 611 else 0.1 * jump,
    )
    assert (611 in jumped) is probes


def test_a_risky_margin_makes_it_heed_smaller_rises_of_the_rate():
    def probes(margin: float) -> list[int]:
        return walk(
            AdaptiveSchedule(100),
            range(1000),
            margin=lambda t: margin,
            rate=lambda t: 0.1 if t < 611 else 0.13,
        )

    assert 611 in probes(0.3)
    assert 611 not in probes(0.15)


def test_a_falling_rate_needs_no_probe():
    steady = walk(AdaptiveSchedule(100), range(3000))
    assert walk(AdaptiveSchedule(100), range(3000), rate=lambda t: 0.1 * 0.99**t) == steady


def test_a_warm_up_is_probed_at_each_rise_of_the_rate_by_half():
    ramp = walk(AdaptiveSchedule(1000), range(3000), rate=lambda t: 1e-3 * 1.01**t)
    assert max(gaps(ramp)) <= 41  # 1.01^41 = 1.504


def test_sentinels_look_every_10_steps_at_first_and_while_a_margin_is_high_else_every_20():
    def glances(margin: float) -> list[int]:
        schedule, found = AdaptiveSchedule(100), []
        for step in range(400):
            if schedule.due(step, lr_ratio=1.0, margin=margin):
                schedule.probed(step, margin=margin)
            elif schedule.glance_due(step, lr_ratio=1.0, margin=margin):
                schedule.glanced(step, margin=margin)
                found.append(step)
        return found

    calm, risky = glances(0.1), glances(0.4)
    assert set(gaps([s for s in calm if 85 < s < 100])) <= {10}
    late = gaps([s for s in calm if s > 150])
    assert min(late) == 20
    assert max(late) <= 40  # with a probe in between
    near = gaps([s for s in risky if s > 150])
    assert min(near) == 10
    assert max(near) <= 20


def test_a_fixed_interval_has_no_sentinels():
    schedule = make_schedule("fixed", 50)
    assert not any(schedule.glance_due(s, lr_ratio=1.0, margin=1.0) for s in range(100))


def test_a_margin_that_could_not_be_measured_keeps_the_run_of_intervals():
    schedule = AdaptiveSchedule(100)
    for step in (0, 1, 2, 3, 5, 8):
        schedule.probed(step, margin=None)
    assert not schedule.due(22, lr_ratio=1.0, margin=None)
    assert schedule.due(23, lr_ratio=1.0, margin=None)


def test_a_high_margin_after_a_failed_probe_is_followed_closely():
    schedule = AdaptiveSchedule(100)
    for step in range(0, 1000, 100):
        schedule.probed(step, margin=0.1)
    schedule.probed(1000, margin=None)
    schedule.probed(1100, margin=0.6)
    assert schedule.due(1105, lr_ratio=1.0, margin=0.6)


def random_course(seed: int, scale: float) -> Course:
    rng, value, course = random.Random(seed), scale, []
    for _ in range(1500):
        value *= math.exp(rng.gauss(0, 0.03))
        course.append(value)
    return course.__getitem__


@pytest.mark.parametrize("seed", range(5))
def test_the_same_margins_give_the_same_schedule_whatever_the_clock(seed, monkeypatch):
    margin, rate = random_course(seed, 0.2), random_course(seed + 100, 0.1)
    once = walk(AdaptiveSchedule(50), range(1500), margin=margin, rate=rate)
    clock = itertools.count(step=1000.0)
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: next(clock))
    assert walk(AdaptiveSchedule(50), range(1500), margin=margin, rate=rate) == once


@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_goes_on_where_another_stopped(seed):
    margin, rate = random_course(seed, 0.2), random_course(seed + 100, 0.1)
    whole = walk(AdaptiveSchedule(50), range(1500), margin=margin, rate=rate)
    for cut in random.Random(seed).sample(range(1, 1500), 5):
        first, second = AdaptiveSchedule(50), AdaptiveSchedule(50)
        before = walk(first, range(cut), margin=margin, rate=rate)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        last = (margin(before[-1]), rate(before[-1]))
        after = walk(second, range(cut, 1500), margin=margin, rate=rate, last=last)
        assert before + after == whole


# Errors


@pytest.mark.parametrize("every", [0, -5, 2.5, True, "100", None])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(
        geomwatch.UsageError, match=rf"every must be an integer >= 1, got {every!r}"
    ):
        make_schedule("adaptive", every)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(
        geomwatch.UsageError, match='schedule must be "adaptive" or "fixed", got \'hourly\''
    ):
        make_schedule("hourly", 10)
