"""What a monitor holds of a run is bounded; and what copies or pickles of its holders do."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from run_lines import alert, record

from geomwatch import Estimate, Monitor, UsageError
from geomwatch.monitoring.history import Ring, of_alert, of_record


def measured(step: int, value: float | None) -> Any:
    return record(step=step, estimates={"lambda_max": Estimate(value)})


def test_a_ring_holds_the_latest_and_the_extremes():
    values = list(range(100))
    random.Random(0).shuffle(values)
    ring = Ring(of_record, most=10)
    for step, value in enumerate(values):
        ring.append(measured(step, float(value)))
    assert len(ring) == 10
    assert ring.dropped == 90
    steps = [r.step for r in ring]
    assert steps == sorted(steps)
    assert {values.index(0), values.index(99)} <= set(steps)
    assert set(range(92, 100)) <= set(steps)


def test_a_ring_of_extremes_alone_still_drops():
    ring = Ring(of_record, most=3)
    for step in range(50):  # each is a new largest one, and has no number that is one
        ring.extend(
            [measured(step, float(step)), measured(step, None), measured(step, float("nan"))]
        )
    assert len(ring) == 3
    assert ring.dropped == 147
    assert ring[0].step == 0


def test_of_alerts_those_with_the_extremes_of_a_rule_stay():
    ring = Ring(of_alert, most=4)
    for step in range(20):
        ring.append(alert(step=step, value=9.0 if step == 3 else 1.0))
    assert [a.step for a in ring] == [0, 3, 18, 19]


def test_the_bound_of_a_monitors_history_can_be_set():
    model, batch = mlp(64, 4, 10), digits(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = Monitor(model, cross_entropy, optimizer, every=1)
    monitor.history.most = 2
    for _ in range(4):
        cross_entropy(model, batch).backward()
        monitor.step(batch)
        optimizer.step()
    assert len(monitor.history) <= 2
    assert monitor.history.dropped >= 2


class Holder(torch.nn.Module):
    """A module that keeps its monitor, as a LightningModule may."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(64, 4, 10)
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.monitor: Monitor | None = Monitor(self.net, cross_entropy, self.optimizer, every=1)

    def train_step(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.net, digits(16)).backward()
        assert self.monitor is not None
        self.monitor.step(digits(16))
        self.optimizer.step()


def test_a_copy_of_what_holds_a_monitor_leaves_it_to_the_original():
    holder = Holder()
    holder.train_step()
    averaged = copy.deepcopy(holder)
    assert averaged.monitor is holder.monitor
    assert averaged.net is not holder.net
    holder.train_step()
    assert [r.step for r in holder.monitor.history] == [0, 1]


def test_pickling_what_holds_a_monitor_says_what_to_do():
    holder = Holder()
    holder.train_step()
    with pytest.raises(UsageError, match=r"Save monitor\.state_dict\(\)"):
        pickle.dumps(holder)
    pickle.loads(pickle.dumps(holder.net))  # what it watches is not bound to it
    other = pickle.loads(pickle.dumps(holder.optimizer))
    assert not other._optimizer_step_post_hooks
    state, holder.monitor = holder.monitor.state_dict(), None
    revived = pickle.loads(pickle.dumps((holder, state)))[0]
    revived.monitor = Monitor(revived.net, cross_entropy, revived.optimizer, every=1)
    revived.monitor.load_state_dict(state)
    revived.train_step()
    assert [r.step for r in revived.monitor.history] == [1]
