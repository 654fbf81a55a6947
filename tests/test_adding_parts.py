"""A new part is one new file: what docs/architecture.md says of adding one, done and undone."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.quantities.table import QUANTITIES, Quantity
from geomwatch.rules import default_rules

RULE = '''
"""The loss lies above a level."""

from geomwatch.isolation.state import Kept, Resumable
from geomwatch.records import Alert
from geomwatch.rules.rule import Latch


class LossAbove(Resumable):
    """Warns once while the loss is above `level`."""

    name = "loss_above"

    _latch: Kept[Latch]

    def __init__(self, *, level: float = 1.0) -> None:
        self.level = level
        self._latch = Latch()

    def __call__(self, step):
        loss = None if step.settled is None else step.settled.loss
        if loss is None or loss <= self.level or not self._latch.admit("warning", step.index):
            return None
        message = f"Look at the data: the loss is {loss:.3g} (alert above {self.level:g})."
        return Alert(self.name, "warning", message, loss, self.level, step.settled.step)
'''

QUANTITY = '''
"""The largest entry of the gradient."""

from geomwatch.records import Estimate


def largest_slope(gradient):
    """Return max |g_i|. In units of loss / weight. No HVPs."""
    return Estimate(float(gradient.abs().max()))
'''

CONTROLLER = '''
"""Half the rate after any alert."""

from geomwatch.controllers import Move


class Halver:
    """Holds the rate at half of the user's from the first alert on."""

    knob = "lr_scale"

    def __call__(self, step, alerts, knobs):
        return [Move(self.knob, 0.5 * max(step.lr), "an alert was raised")] if alerts else []
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Return a function that adds one file beside the package, and imports it."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name: str, text: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        (Path(tmp_path) / f"{name}.py").write_text(text, encoding="utf-8")
        return importlib.import_module(name)

    return add


def trained(steps: int, **options) -> geomwatch.Monitor:
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with geomwatch.Monitor(model, cross_entropy, optimizer, **options) as monitor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
    return monitor


def test_a_rule_is_one_file(added):
    rule = added("loss_above", RULE).LossAbove
    monitor = trained(3, rules=[*default_rules(), rule()])
    assert [(a.rule, a.step) for a in monitor.alerts] == [("loss_above", 0)]
    resumed = rule()
    resumed.load_state_dict(monitor.state_dict()["dispatch"]["rules"][-1])
    assert resumed._latch.severity == "warning"


def test_a_quantity_is_one_file_and_one_row(added, monkeypatch):
    largest_slope = added("largest_slope", QUANTITY).largest_slope
    row = Quantity(lambda probe: largest_slope(probe.objective.gradient()), needs_products=False)
    monkeypatch.setitem(QUANTITIES, "largest_slope", row)
    how = geomwatch.Measurement(quantities="largest_slope")
    (record,) = trained(1, how=how).history
    assert 0 < record["largest_slope"].value < 1
    assert "geom/largest_slope" in record.scalars()


def test_a_controller_is_one_file(added):
    rule, halver = added("loss_above", RULE).LossAbove, added("halver", CONTROLLER).Halver
    monitor = trained(3, rules=rule(), controllers=halver())
    (adjustment,) = monitor.adjustments
    assert (adjustment.knob, adjustment.after) == ("lr_scale", 0.5)
    assert adjustment.reason == "an alert was raised"
