"""Files read back: whole, torn, of other versions, empty, huge, and damaged at random."""

from __future__ import annotations

import json
import math
import random
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_lines import alert, record, watched_run

import geomwatch
from geomwatch import Adjustment, JsonLines, Record
from geomwatch.records import SCHEMA
from geomwatch.sinks import Line, adjustment_line, alert_line, read, record_line, run_line


def written(path: Path, *lines: Line) -> Path:
    sink = JsonLines(path)
    for line in lines:
        sink(line)
    return path


def reasons(path: Path) -> list[tuple[int, str]]:
    return [(lost.line, lost.reason) for lost in read(path).lost]


def plain(record: Record) -> str:
    """All of a record, by which NaN equals NaN."""
    return repr(replace(record, estimates=dict(record.estimates)))


# Whole files


def test_a_run_is_read_back_as_the_monitor_has_it(tmp_path):
    monitor = watched_run(tmp_path / "run.jsonl", lr=20.0)
    found = geomwatch.read(str(tmp_path / "run.jsonl"))
    assert not found.lost
    assert list(map(plain, found.records)) == list(map(plain, monitor.history))
    assert repr(found.alerts) == repr(tuple(monitor.alerts))
    assert any(record.alerts for record in found.records)
    assert found.run["optimizer"] == "SGD momentum 0.9"
    assert len(found.runs) == 1


def test_what_controllers_did_is_read_back(tmp_path):
    turned = Adjustment("lr_scale", 1.0, 0.5, "the margin", 40, "dry run")
    later = replace(turned, step=41)
    clip = Adjustment("clip_norm", math.inf, 2.0, "spikes", 40)
    lines = map(adjustment_line, (turned, clip, later))
    own = record(knobs={"clip_norm": math.inf, "lr_scale": 0.5})
    found = read(written(tmp_path / "run.jsonl", record_line(own), *lines))
    assert found.adjustments == (turned, clip, later)
    assert found.records[0].adjustments == (turned, clip)
    assert found.records[0].knobs == own.knobs


def test_what_is_not_finite_is_nan(tmp_path):
    lines = record_line(record(loss=math.inf, lr=(math.nan,))), alert_line(alert(value=math.nan))
    found = read(written(tmp_path / "run.jsonl", *lines))
    assert math.isnan(found.records[0].loss)
    assert math.isnan(found.records[0].lr[0])
    assert math.isnan(found.alerts[0].value)
    assert found.records[0]["grad_norm"].value is None


def test_an_empty_file_holds_nothing_and_loses_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"\n\r\n")
    assert read(path) == geomwatch.Run()
    assert read(path).run == {}


def test_a_missing_file_is_said_by_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read(tmp_path / "none.jsonl")


def test_runs_that_share_a_file_are_told_apart(tmp_path):
    lines = [run_line({"seed": 1}), record_line(record()), run_line({"seed": 2})]
    found = read(written(tmp_path / "run.jsonl", *lines, alert_line(alert(step=40))))
    assert [run["seed"] for run in found.runs] == [1, 2]
    assert found.run["seed"] == 2
    assert not found.records[0].alerts  # the alert is of the other run


def test_the_monitors_of_a_group_can_be_read_apart(tmp_path):
    lines = [
        {**record_line(record(step=step)), "monitor": name} for step in (1, 2) for name in "ab"
    ]
    lines[1:1] = [{**alert_line(alert(step=1)), "monitor": "b"}]
    path = written(tmp_path / "run.jsonl", *lines)
    assert read(path).monitors == ("a", "b")
    assert [len(read(path, monitor=name).records) for name in (None, "a", "b", "c")] == [4, 2, 2, 0]
    assert not read(path).records[0].alerts  # it is of the other monitor


# Damaged files


def test_a_torn_last_line_is_lost_and_nothing_else(tmp_path):
    path = written(tmp_path / "run.jsonl", record_line(record()), record_line(record(step=50)))
    path.write_bytes(path.read_bytes()[:-40])
    found = read(path)
    assert [r.step for r in found.records] == [40]
    assert reasons(path)[0][0] == 2
    assert reasons(path)[0][1].startswith("it is no whole JSON")


def test_a_line_that_was_glued_to_a_torn_one_is_read(tmp_path):
    path = tmp_path / "run.jsonl"
    whole = json.dumps(record_line(record()))
    path.write_text(whole[:70] + whole + "\n" + whole + "\n", encoding="utf-8")
    assert len(read(path).records) == 2
    assert reasons(path) == [(1, "its first 70 bytes: torn off")]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\x00\x00\x00\x00", "it is no whole JSON: Expecting value at character 1"),
        (b'{"kind": "\xff"}', "it is no UTF-8 from byte 11 on"),
        (b"[1, 2]", "it is JSON, but no line of a run"),
        (b'{"kind": ["run"]}', "its kind is ['run'], none that is known"),
        (b'{"kind": "film", "schema": 99}', "its kind is 'film', none that is known; it is of"),
        (b'{"kind": "record"}', "a line of kind 'record' can't be read: it has no 'step'"),
        (b'{"kind": "record", "step": true}', "step is True, no integer"),
        (b'{"kind": "record", "step": 1, "loss": "low"}', "loss is 'low', no number"),
        (b'{"kind": "record", "step": 1, "lr": 0.1}', "lr is 0.1, no list"),
        (b'{"kind": "record", "step": 1, "estimates": []}', "estimates is [], no object"),
        (b'{"kind": "alert", "step": 1, "rule": 7, "severity": "info"}', "rule is 7, no text"),
        (b'{"kind": "record", "step": 1, "loss": ' + b"9" * 400 + b"}", "int too large"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_what_cannot_be_read_is_told_by_line_and_reason(raw, reason, tmp_path):
    path = written(tmp_path / "run.jsonl", run_line({}))
    path.write_bytes(path.read_bytes() + raw + b"\n" + path.read_bytes())
    found = read(path)
    assert len(found.runs) == 2
    ((line, told),) = reasons(path)
    assert line == 2
    assert reason in told


def test_lines_of_other_versions_are_read_for_what_they_have(tmp_path):
    new: dict[str, Any] = {**record_line(record()), "schema": SCHEMA + 1, "colour": "blue"}
    new["estimates"] = {"trace": {"value": 1, "confidence": 0.9}}
    old = record_line(record(provenance={"hvp": "double backward"}))
    old |= {"schema": 1, "how": old.pop("provenance")}
    del old["knobs"]
    path = written(tmp_path / "run.jsonl", new, old)
    assert not reasons(path)
    newer, older = read(path).records
    assert newer["trace"].value == 1.0
    assert older.provenance == {"hvp": "double backward"}
    written(path, {**new, "step": None})
    assert reasons(path)[0][1].endswith(f"it is of schema {SCHEMA + 1}, this version of geomwatch "
                                        f"reads up to {SCHEMA}")  # fmt: skip


def test_damage_of_any_kind_raises_nothing_and_loses_only_what_it_hit(tmp_path):
    whole = [run_line({"seed": 0})]
    whole += [record_line(record(step=step)) for step in range(5)]
    whole += [alert_line(alert(step=4)), adjustment_line(Adjustment("lr_scale", 1, 0.5, "x"))]
    intact = written(tmp_path / "run.jsonl", *whole).read_bytes()
    damaged, rng = tmp_path / "damaged.jsonl", random.Random(0)
    for _ in range(100):
        raw, hit = bytearray(intact), 0
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(raw))
            width = rng.randint(1, 300)
            patch = rng.choice([b"", b"\x00" * width, rng.randbytes(width), raw[at // 2 :][:width]])
            hit += raw[at : at + width].count(b"\n") + patch.count(b"\n") + 1
            raw[at : at + width] = patch
        damaged.write_bytes(raw)
        found = read(damaged)
        kept = [found.runs, found.records, found.alerts, found.adjustments]
        assert sum(map(len, kept)) + 2 * hit >= len(whole)
        assert all(lost.reason and lost.line >= 1 for lost in found.lost)


def test_a_huge_file_is_read_a_line_at_a_time(tmp_path):
    path = tmp_path / "run.jsonl"
    line = json.dumps({"kind": "alien", "padding": "x" * 10_000}) + "\n"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(2_000):
            file.write(line)
    tracemalloc.start()
    assert len(read(path).lost) == 2_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4e6 < path.stat().st_size
