"""The pages of rules: numbers come from the fields, and a rule of one's own has a page too."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from problems import cross_entropy, digits, mlp

import geomwatch
from geomwatch.observation.documented import rows_of
from geomwatch.rules import DEFAULT, GradientLevels, GradientMargin, StabilityMargin, default_rules
from geomwatch.rules.explain import explain


@pytest.mark.parametrize("kind", DEFAULT)
def test_a_page_lists_every_level_once_and_leaves_no_place_empty(kind):
    page = explain(kind.name)
    listed = re.findall(r"^\| `([a-z_.]+)` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name, _, _ in rows_of(kind))
    assert not re.search(r"[{}]", page)
    assert page == explain(kind) == explain(kind())


def test_a_page_shows_the_levels_of_the_rule_that_is_asked_about():
    page = explain(StabilityMargin(warning=0.65))
    assert "| mean > 0.65, measured twice |" in page
    assert "| `warning` | `0.65` | mean margin: warning (theory: the limit) |" in page
    page = explain(GradientMargin(levels=GradientLevels(sgd=9)))
    assert "geometric mean of the last 60 steps > 9, at least" in page


@pytest.mark.parametrize("kind", DEFAULT)
def test_the_page_of_a_rule_says_no_number_that_its_fields_say(kind):
    """What is said of the present levels is filled in; history may hold any number."""
    page = (Path(geomwatch.__file__).parent / "rules/pages" / f"{kind.name}.md").read_text()
    speaks = page.partition("## When it speaks")[2].partition("\n## ")[0]
    rows = [line for line in speaks.splitlines() if line.startswith("|") and "---" not in line]
    said = re.findall(r"[<>] ?(\d+(?:\.\d+)?)\b(?! x)", " ".join(rows))
    assert said == []


@pytest.mark.parametrize("kind", DEFAULT)
def test_a_docstring_says_no_level_but_in_its_arguments(kind):
    text = kind.__doc__.partition("\nArgs:")[0]
    levels = {f"{v:g}" for _, v, _ in rows_of(kind) if v not in (1, 2)}  # as in 2 (1 - mu)
    assert levels & set(re.findall(r"[<>] ?(\d+(?:\.\d+)?)", text)) == set()


OWN = '''
"""The loss is above a level."""

from dataclasses import dataclass

from geomwatch.observation.documented import level
from geomwatch.rules.message import alert
from geomwatch.rules.rule import LatchedRule


@dataclass(kw_only=True, eq=False, repr=False)
class LossAbove(LatchedRule):
    """Warns while the loss is above `most`."""

    name = "loss_above"
    says = ("warning",)

    most: float = level(1.0, "loss that warns", source="a whim")

    def __call__(self, step):
        loss = None if step.settled is None else step.settled.loss
        if loss is None or loss <= self.most or not self._latch.admit("warning", step.index):
            return None
        text = f"the loss is {loss:.3g} (alert above {self.most:g}). Look at the data."
        return alert(self.name, "warning", text, value=loss, limit=self.most, step=step.index)
'''


def test_a_rule_of_ones_own_is_one_file_and_one_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "loss_above", raising=False)
    (tmp_path / "loss_above.py").write_text(OWN)
    rule = importlib.import_module("loss_above").LossAbove
    assert explain(rule).startswith("# loss_above\n\nWarns while the loss is above `most`.")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/loss_above.md").write_text("# loss_above\n\nAbove {most}.\n\n{levels}\n")
    page = explain(rule(most=0.5))
    assert page.startswith("# loss_above\n\nAbove 0.5.\n")
    assert "| `most` | `0.5` | loss that warns (a whim) |" in page
    assert "| `once.release` | `15` |" in page
    monitor = watched(rules=[*default_rules(), rule(most=0.5)])
    assert [(a.rule, a.step) for a in monitor.alerts] == [("loss_above", 1)]
    assert "alert above 0.5" in monitor.alerts[0].message
    other = watched(rules=[*default_rules(), rule(most=50)])
    assert other.alerts == []
    other.load_state_dict(monitor.state_dict())
    assert other.state_dict()["dispatch"] == monitor.state_dict()["dispatch"]


def watched(**options) -> geomwatch.Monitor:
    torch.manual_seed(0)
    model, batch = mlp(64, 16, 10), digits(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with geomwatch.Monitor(model, cross_entropy, optimizer, **options) as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = cross_entropy(model, batch)
            loss.backward()
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
    return monitor
