"""Steps that raise the loss of their own batches: one by much, or several on average."""

from __future__ import annotations

import math

import pytest
from observations import heard

from geomwatch.observation.taken import Taken
from geomwatch.rules import Observation, TakenStep


def taken(step: int, rise: float) -> Observation:
    return Observation(index=step + 1, lr=(0.1,), taken=Taken(step, 2.0, 2.0 + rise, 0.1))


@pytest.mark.parametrize(
    ("rise", "severity"), [(0.7, "warning"), (2.5, "critical"), (math.nan, "critical")]
)
def test_one_step_that_raises_it_by_much_is_said(rise, severity):
    (alert,) = heard(TakenStep(), [taken(0, rise)])
    assert alert.severity == severity
    assert "has taken the loss of its own batch from 2 to" in alert.message


def test_a_little_counts_on_average_only():
    rises = [0.1, 0.12, 0.08, 0.11, 0.09]
    assert not heard(TakenStep(), [taken(t, r) for t, r in enumerate(rises[:4])])
    (alert,) = heard(TakenStep(), [taken(t, r) for t, r in enumerate(rises)])
    assert (alert.severity, alert.step) == ("warning", 5)


def test_steps_that_now_raise_it_and_now_lower_it_are_healthy():
    assert not heard(TakenStep(), [taken(t, 0.2 * (-1) ** t) for t in range(20)])


def test_it_is_silent_where_nothing_was_looked_at():
    assert not heard(TakenStep(), [Observation(index=t, lr=(0.1,)) for t in range(9)])
