"""The published schema of a line is what files hold, no less and no more."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits, mlp
from run_lines import alert, lines_of, record

from geomwatch import Adjustment, Group, JsonLines, Monitor
from geomwatch.controllers import LearningRateCap
from geomwatch.records import SCHEMA
from geomwatch.sinks import Line, adjustment_line, alert_line, end_line, record_line

PAGE = Path(__file__).parents[2] / "docs" / "run.schema.json"
PUBLISHED = json.loads(PAGE.read_text(encoding="utf-8"))
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
}
KNOWN = {"$schema", "$defs", "title", "description"}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid, for the part of JSON Schema that the page uses."""
    checks = {
        "$ref": lambda to: fits(value, PUBLISHED["$defs"][to.removeprefix("#/$defs/")]),
        "oneOf": lambda several: sum(fits(value, one) for one in several) == 1,
        "type": lambda names: any(
            is_a(value, name) for name in ([names] if isinstance(names, str) else names)
        ),
        "const": lambda one: value == one,
        "enum": lambda several: value in several,
        "minimum": lambda least: value >= least,
        "required": lambda names: set(names) <= set(value),
        "items": lambda each: all(fits(entry, each) for entry in value),
        "properties": lambda known: all(fits(value[k], s) for k, s in known.items() if k in value),
        "additionalProperties": lambda other: all(
            other and fits(entry, other)
            for key, entry in value.items()
            if key not in schema.get("properties", {})
        ),
    }
    assert set(schema) <= set(checks) | KNOWN, "a keyword that this test can't check"
    return all(
        checks[key](schema[key]) for key in ("type", *schema) if key in schema and key in checks
    )


def is_a(value: Any, name: str) -> bool:
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def real_lines(path: Path) -> list[Line]:
    """Lines of a group of two monitors, one with a controller, whose run goes wrong."""
    nets = [mlp(64, 4, 10) for _ in range(2)]
    sink = JsonLines(path)
    optimizers = [torch.optim.SGD(net.parameters(), lr=20.0, momentum=0.9) for net in nets]
    monitors = {
        name: Monitor(net, cross_entropy, optimizer, every=2, sinks=sink, controllers=controllers)
        for name, net, optimizer, controllers in zip(
            "ab", nets, optimizers, ((), LearningRateCap(dry_run=True)), strict=True
        )
    }
    batch = digits(32)
    with Group(**monitors) as group:
        for _ in range(4):
            for net, optimizer, (name, _) in zip(nets, optimizers, monitors.items(), strict=True):
                optimizer.zero_grad()
                cross_entropy(net, batch).backward()
                group[name].step(batch)
                optimizer.step()
    return lines_of(path)


def made_by_hand(path: Path) -> list[Line]:
    sink = JsonLines(path)
    sink(record_line(record(loss=math.nan, knobs={"clip_norm": math.inf})))
    sink(alert_line(alert(value=math.inf)))
    sink(adjustment_line(Adjustment("clip_norm", math.inf, 1.0, "spikes", 3, "advice")))
    sink(end_line(3, 0.5, None))
    return lines_of(path)


def test_real_files_are_valid(tmp_path):
    lines = real_lines(tmp_path / "real.jsonl") + made_by_hand(tmp_path / "own.jsonl")
    assert {line["kind"] for line in lines} == {
        "run",
        "record",
        "look",
        "alert",
        "adjustment",
        "end",
    }
    assert not [line for line in lines if not fits(line, PUBLISHED)]


def test_the_schema_describes_every_field_of_a_line(tmp_path):
    for line in real_lines(tmp_path / "run.jsonl"):
        assert set(line) <= set(PUBLISHED["$defs"][line["kind"]]["properties"])


def test_the_version_is_that_of_the_package():
    assert PUBLISHED["$defs"]["schema"]["const"] == SCHEMA


@pytest.mark.parametrize("kind", range(4))
def test_a_line_that_lacks_a_field_or_has_another_type_is_not_valid(kind, tmp_path):
    line = made_by_hand(tmp_path / "run.jsonl")[kind]
    assert fits(line, PUBLISHED)
    for field in line:
        without, other = copy.deepcopy(line), copy.deepcopy(line)
        del without[field]
        other[field] = "yes" if field == "followed" else True
        assert not fits(without, PUBLISHED), field
        assert not fits(other, PUBLISHED), field
    assert not fits({**line, "colour": "blue"}, PUBLISHED)
