"""What the users of hosts ask for: the options of a Monitor, refused where they are written."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp

from geomwatch import Measurement, Monitor, UsageError
from geomwatch.integrations._host.loss import HostLoss
from geomwatch.integrations._host.options import MonitorOptions, Options
from geomwatch.isolation.reach import captured_by


class Loss(HostLoss):
    """The cross-entropy of a teacher's net and the model's, as a host would evaluate it."""

    __slots__ = ()

    def evaluate(self, model: Any, batch: Any, call: Any, share: float) -> Any:
        return cross_entropy(model, batch)

    def isolates(self) -> list[object]:
        return captured_by(cross_entropy)


def monitor(**options: Any) -> tuple[torch.nn.Module, Any, Monitor]:
    model = mlp(64, 8, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted = MonitorOptions("Callback(", options.pop("how", None), options)
    wanted.check([None])
    return model, optimizer, wanted.monitor(model, Loss(None), optimizer, actuators=list)


def test_the_options_that_hosts_pass_on_are_those_of_the_monitor():
    own = [name for name in inspect.signature(Monitor).parameters if name != "gone"]
    assert own == ["model", "loss_fn", "optimizer", "how", *Options.__annotations__]
    assert len(own) == 10


@pytest.mark.parametrize(
    ("old", "line"),
    [
        ({"max_overhead": 0.05}, r"Callback\(budget=0.05\)"),
        ({"schedule": "fixed"}, r"Callback\(every=100\)"),
        ({"quantities": "all"}, r"Callback\(how=Measurement\(quantities='all'\)\)"),
        ({"micro_batch": 8}, r"Callback\(how=Measurement\(micro_batch=8\)\)"),
        ({"mode": "eval"}, r"Callback\(how=Measurement\(mode='eval'\)\)"),
        ({"probe_batch": 3}, r"Callback\(how=Measurement\(batch=...\)\)"),
        ({"dry_run": True}, r"Callback\(controllers=LearningRateCap\(dry_run=True\)\)"),
        ({"evry": 3}, r"Callback has no argument 'evry'. Did you mean 'every'"),
    ],
)
def test_an_option_that_has_gone_is_refused_with_the_line_to_write(old, line):
    with pytest.raises(UsageError, match=line):
        monitor(**old)


def test_what_needs_a_model_is_refused_when_there_is_one():
    how = Measurement(params="head.*")
    MonitorOptions("Callback(", how, {}).check([None])
    with pytest.raises(UsageError, match="params must match at least one trainable parameter"):
        monitor(how=how)


def test_one_item_does_for_a_list(tmp_path):
    teacher = torch.nn.Dropout()
    model, _, watching = monitor(
        how=Measurement(also=teacher, quantities="loss"), every=1, sinks=tmp_path / "run.jsonl"
    )
    batch = digits(8)
    cross_entropy(model, batch).backward()
    assert watching.step(batch) is not None
    assert '"kind": "record"' in (tmp_path / "run.jsonl").read_text()


def test_messages_speak_of_the_monitor_as_the_callback_has_it(caplog):
    model, _, watching = monitor(every=1)
    own = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    cross_entropy(model, digits(8)).backward()
    watching.step(digits(8))
    watching.follow(own)
    assert "own parameters: callback.monitor.follow(optimizer)" in caplog.text
