"""The limit of the gradient margin, as probes of micro-batches set it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from geomwatch.controllers import LearningRateCap
from geomwatch.controllers.learning_rate_cap.limit import CapLimits, Limit
from geomwatch.observation.observer import Observer
from geomwatch.records import Estimate
from geomwatch.rules import Observation


def seen(
    step: int = 30,
    *,
    along: float | None = 1.0,
    margin: float = 0.1,
    stochastic: float | None = None,
    status: str = "ok",
    **more: Any,
) -> Observation:
    """A probe; with a stochastic margin if it has measured micro-batches."""
    estimates = {"stability_margin": Estimate(margin)}
    if stochastic is not None:
        estimates["stochastic_margin"] = Estimate(stochastic, status=status)
    return Observation(
        index=step,
        lr=(0.1,),
        fresh=True,
        gradient_margin=Estimate(along),
        gradient_fresh=True,
        estimates=estimates,
        **{"limit_ratio": 19.0} | more,
    )


def limit(*probes: Observation) -> float:
    found, observer = Limit(CapLimits()), Observer()
    known = [observer(probe) for probe in probes]
    for probe in known:
        found.update(probe)
    return found.at(known[-1])


def test_without_micro_batches_it_is_that_of_the_kind_of_optimizer():
    assert limit(seen()) == 2
    assert limit(seen(adaptive=True)) == 1
    assert limit(seen(stochastic=0.9, status="withheld")) == 2
    assert limit(seen(stochastic=0.9, status="held")) == 2


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("along", "stochastic", "expected"),
    [(1.0, 1.0, 1.25), (2.4, 2.0, 1.5), (0.3, 1.0, 1.0), (3.0, 1.0, 2.0), (-1.0, 1.0, 1.0)],
)
def test_it_is_what_the_margin_along_the_gradient_has_where_the_stochastic_holds(
    along, stochastic, expected, adaptive
):
    probe = seen(along=along, stochastic=stochastic, adaptive=adaptive)
    assert limit(probe) == pytest.approx(expected)


def test_the_last_probe_that_could_tell_counts():
    probes = [seen(along=a, stochastic=1.0) for a in (2.0, 0.9)]
    assert limit(*probes, seen(along=2.0)) == pytest.approx(1.25 * 0.9)


def test_the_first_steps_can_not_tell():
    assert limit(seen(19, along=1.0, margin=0.9, stochastic=1.0)) == 2
    assert limit(seen(20, along=1.0, margin=0.9, stochastic=1.0)) == 5


def test_where_noise_hardly_matters_it_is_higher():
    assert limit(seen(margin=0.5, stochastic=0.64)) == 5
    assert limit(seen(margin=0.5, stochastic=0.66)) < 5
    assert limit(seen(margin=0.09, stochastic=0.09)) < 5  # too far from any limit to tell


@pytest.mark.parametrize(("momentum", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.9, 5.0)])
def test_it_is_never_beyond_that_of_the_full_batch(momentum, expected):
    ratio = (1 + momentum) / (1 - momentum)
    assert limit(seen(margin=0.5, stochastic=0.5, limit_ratio=ratio)) == pytest.approx(expected)


def test_the_cap_goes_by_it_once_it_is_known():
    cap = LearningRateCap()
    (lowered,) = cap(seen(0, along=8.0))
    assert lowered.to == pytest.approx(0.1 * 2 / 8)
    (again,) = cap(seen(30, along=8.0, margin=0.8, stochastic=8.0))
    assert again.to == pytest.approx(0.1 * 1.25 / 8)


def test_a_limit_that_was_asked_for_stays():
    cap = LearningRateCap(c_bs=3.0)
    (lowered,) = cap(seen(0, along=8.0, margin=0.8, stochastic=0.8))
    assert lowered.to == pytest.approx(0.1 * 3 / 8)


def test_it_survives_a_resume():
    first, second = Limit(CapLimits()), Limit(CapLimits())
    first.update(seen(along=1.3, stochastic=1.0))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for found in (first, second):
        found.update(seen(along=1.1, stochastic=1.0))
    assert second.at(seen()) == first.at(seen())
