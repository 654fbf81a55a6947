"""When probes are due: exactly so many, or dense when it matters; from steps and margins only."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.monitoring.budget import Account
from geomwatch.monitoring.schedule import Cadence, Schedule
from geomwatch.parallel.ranks import Ranks

Course = Callable[[int], float]


def calm(step: int) -> float:
    return 0.1


def schedule_of(every: int | None = None, **cadence: Any) -> Schedule:
    account = Account(None, counts_work=False)
    return Schedule(every, account, Ranks(), Cadence(**cadence))


def walk(
    schedule: Schedule,
    steps: range,
    *,
    margin: Course = calm,
    rate: Course = calm,
    last: tuple[float, float] | None = None,
) -> list[int]:
    """Ask as a monitor does: the margin of the last probe is held, re-scaled to the rate now."""
    probed = []
    for step in steps:
        growth = 1.0 if last is None else rate(step) / last[1]
        held = None if last is None else last[0] * growth
        due = schedule.look(step, (rate(step),), margin=held, growth=growth, growth_along=1.0)
        if due == "probe":
            last = (margin(step), rate(step))
            schedule.probed(step, last[0])
            probed.append(step)
        elif due == "sentinel":
            schedule.looked(step, held)
    return probed


def is_probed(schedule: Schedule, step: int, margin: float | None) -> bool:
    return schedule.look(step, (0.1,), margin=margin, growth=1.0, growth_along=1.0) == "probe"


def gaps(steps: list[int]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(steps)]


# By an interval


@pytest.mark.parametrize(("every", "steps"), [(1, 7), (3, 30), (3, 31), (10, 9), (7, 50), (50, 50)])
def test_an_interval_gives_exactly_its_records(every, steps):
    model, batch = mlp(64, 4, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with geomwatch.Monitor(
        model, cross_entropy, optimizer, how=geomwatch.Measurement(quantities=["loss"]), every=every
    ) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            monitor.step(batch)
            optimizer.step()
    assert [r.step for r in monitor.history] == list(range(0, steps, every))
    assert len(monitor.history) == math.ceil(steps / every)


def test_an_interval_heeds_no_margin_but_a_rise_of_the_rate_by_half():
    assert walk(schedule_of(20), range(100), margin=lambda t: 2.0 * t) == [0, 20, 40, 60, 80]
    assert walk(schedule_of(20), range(50), rate=lambda t: 0.1 if t < 33 else 0.2) == [
        *(0, 20, 33, 40)
    ]


def test_twice_the_interval_is_half_the_probes():
    few, many = (len(walk(schedule_of(every), range(1000))) for every in (100, 99))
    assert (few, many) == (10, 11)


def test_a_resumed_run_keeps_to_the_grid_of_its_interval():
    schedule = schedule_of(50)
    assert walk(schedule, range(30, 200)) == [30, 50, 100, 150]


# As it matters


def test_the_start_is_dense():
    assert walk(schedule_of(), range(9)) == [0, 1, 2, 3, 5, 8]


def test_the_interval_then_grows_to_that_of_a_calm_run():
    between = gaps(walk(schedule_of(), range(2000))[5:])
    assert between[:-10] == sorted(between[:-10])
    assert all(b <= 1.6 * a + 1 for a, b in itertools.pairwise(between))
    assert between[-10:] == [100] * 10


@pytest.mark.parametrize("calm_run", [20, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_two_probes_are_never_further_apart_than_in_a_calm_run(calm_run, seed):
    rng = random.Random(seed)
    course = {t: math.exp(rng.gauss(-1, 1)) for t in range(6 * calm_run + 50)}
    probed = walk(schedule_of(calm=calm_run), range(len(course)), margin=course.__getitem__)
    assert max(gaps(probed)) <= calm_run
    assert probed[0] == 0


def test_a_calm_run_costs_little_more_than_its_interval():
    probed = walk(schedule_of(), range(5000))
    assert len(probed) <= 50 + 12


def test_a_rising_margin_makes_probes_denser():
    rising = walk(schedule_of(), range(1500), margin=lambda t: 0.1 * 1.005 ** max(0, t - 900))
    assert max(gaps([t for t in rising if t <= 900])[-2:]) == 100
    # The margin reaches 0.25 at step 1084, the first warning level at 1223 and 0.6 at 1260.
    late = gaps([t for t in rising if t > 1260])
    assert max(late) <= 30
    assert min(late) == 5
    first_warning = [t for t in rising if t > 1223]
    assert first_warning[1] <= 1223 + 60  # two measurements: what a warning takes


def test_a_margin_that_jumps_to_the_limit_is_followed_every_few_steps():
    jumping = walk(schedule_of(), range(3000), margin=lambda t: 0.1 if t < 1000 else 0.8)
    seen = next(t for t in jumping if t >= 1000)
    assert [t - seen for t in jumping if t >= seen][:2] == [0, 5]


def test_a_low_margin_may_rise_unattended():
    # from 0.001 to 0.22
    rising = walk(schedule_of(), range(2700), margin=lambda t: 0.001 * 1.002**t)
    assert gaps(rising)[-10:] == [100] * 10


def test_a_high_margin_that_holds_still_lets_the_probes_thin_out():
    level = walk(schedule_of(), range(3000), margin=lambda t: 0.1 if t < 300 else 0.7)
    assert gaps(level)[-10:] == [100] * 10


@pytest.mark.parametrize(("margin", "jump", "probes"), [(0.1, 1.6, True), (0.1, 1.4, False)])
def test_a_jump_of_the_rate_is_probed_at_once(margin, jump, probes):
    jumped = walk(
        schedule_of(),
        range(1000),
        margin=lambda t: margin,
        rate=lambda t: 0.1 if t < 611 else 0.1 * jump,
    )
    assert (611 in jumped) is probes


def test_a_risky_margin_makes_it_heed_smaller_rises_of_the_rate():
    def probes(margin: float) -> list[int]:
        return walk(
            schedule_of(),
            range(1000),
            margin=lambda t: margin,
            rate=lambda t: 0.1 if t < 611 else 0.13,
        )

    assert 611 in probes(0.3)
    assert 611 not in probes(0.15)


def test_a_falling_rate_needs_no_probe():
    steady = walk(schedule_of(), range(3000))
    assert walk(schedule_of(), range(3000), rate=lambda t: 0.1 * 0.99**t) == steady


def test_a_warm_up_is_probed_at_each_rise_of_the_rate_by_half():
    ramp = walk(schedule_of(calm=1000), range(3000), rate=lambda t: 1e-3 * 1.01**t)
    assert max(gaps(ramp)) <= 41  # 1.01^41 = 1.504


def test_sentinels_look_at_half_the_age_of_a_run_and_every_10_steps_while_a_margin_is_high():
    def glances(margin: float) -> list[int]:
        schedule, found = schedule_of(), []
        for step in range(400):
            due = schedule.look(step, (0.1,), margin=margin, growth=1.0, growth_along=1.0)
            if due == "probe":
                schedule.probed(step, margin)
            elif due == "sentinel":
                schedule.looked(step, margin)
                found.append(step)
        return found

    calm, risky = glances(0.1), glances(0.4)
    assert max(gaps([s for s in calm if s < 60])) <= 30
    late = gaps([s for s in calm if s > 150])
    assert min(late) >= 50
    assert max(late) <= 100  # with a probe in between
    near = gaps([s for s in risky if s > 150])
    assert min(near) == 10
    assert max(near) <= 20


def test_a_margin_that_could_not_be_measured_keeps_the_run_of_intervals():
    schedule = schedule_of()
    for step in (0, 1, 2, 3, 5, 8):
        schedule.probed(step, None)
    assert not is_probed(schedule, 22, None)
    assert is_probed(schedule, 23, None)


def test_a_high_margin_after_a_failed_probe_is_followed_closely():
    schedule = schedule_of()
    for step in range(0, 1000, 100):
        schedule.probed(step, 0.1)
    schedule.probed(1000, None)
    schedule.probed(1100, 0.6)
    assert is_probed(schedule, 1105, 0.6)


def random_course(seed: int, scale: float) -> Course:
    rng, value, course = random.Random(seed), scale, []
    for _ in range(1500):
        value *= math.exp(rng.gauss(0, 0.03))
        course.append(value)
    return course.__getitem__


@pytest.mark.parametrize("seed", range(5))
def test_the_same_margins_give_the_same_schedule_whatever_the_clock(seed, monkeypatch):
    margin, rate = random_course(seed, 0.2), random_course(seed + 100, 0.1)
    once = walk(schedule_of(calm=50), range(1500), margin=margin, rate=rate)
    clock = itertools.count(step=1000.0)
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: next(clock))
    assert walk(schedule_of(calm=50), range(1500), margin=margin, rate=rate) == once


@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_goes_on_where_another_stopped(seed):
    margin, rate = random_course(seed, 0.2), random_course(seed + 100, 0.1)
    whole = walk(schedule_of(calm=50), range(1500), margin=margin, rate=rate)
    for cut in random.Random(seed).sample(range(1, 1500), 5):
        first, second = schedule_of(calm=50), schedule_of(calm=50)
        before = walk(first, range(cut), margin=margin, rate=rate)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        last = (margin(before[-1]), rate(before[-1]))
        after = walk(second, range(cut, 1500), margin=margin, rate=rate, last=last)
        assert before + after == whole
