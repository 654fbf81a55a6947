"""A run as one page, several in one another, and as lines in a terminal."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from run_lines import alert, record

from geomwatch import Estimate, JsonLines, Look
from geomwatch.cli import main
from geomwatch.records import Alert
from geomwatch.report.charts import charts_of
from geomwatch.report.compare import compare
from geomwatch.report.page import page, write_page
from geomwatch.report.tail import follow, glance, spark
from geomwatch.report.verdict import verdict_of
from geomwatch.sinks import Run, alert_line, end_line, look_line, read, record_line, run_line

HOSTILE = "</script><script>alert('x')</script>"


def look(step: int, margin: float, lr: float = 0.1, **more) -> Look:
    return Look(step, lr, Estimate(margin, 0.1 * margin, "residual"), limit=7.0, **more)


def troubled() -> Run:
    records = tuple(record(step=t, lr=(0.1 if t < 60 else 0.03,)) for t in (0, 40, 80))
    looks = (look(20, 3.5), look(40, 7.7), look(80, 2.0, lr=0.03))
    found = (alert("warning", rule="gradient_margin", message=HOSTILE, step=40, advised_lr=0.031),)
    facts = {"optimizer": HOSTILE, "torch": "2.13", "parameters": 10, "quantities": ["trace"]}
    return Run(runs=(facts,), records=records, looks=looks, alerts=found)


def healthy() -> Run:
    facts = {"optimizer": "SGD", "torch": "2.13", "parameters": 10, "quantities": ["trace"]}
    return Run(runs=(facts,), records=(record(step=0),), looks=(look(0, 1.0), look(20, 1.1)))


def written(run: Run, path: Path) -> Path:
    sink = JsonLines(path)
    for line in (
        run_line(run.run),
        *map(record_line, run.records),
        *map(look_line, run.looks),
        *map(alert_line, run.alerts),
        end_line(80, 1.0, 0.02, records=run.records, alerts=run.alerts, lr=(0.03,)),
    ):
        sink(line)
    return path


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


# The page


def test_the_page_asks_for_nothing_and_shows_what_a_file_says_as_text():
    run = troubled()
    html = page(run, verdict_of(run), title=HOSTILE)
    assert HOSTILE not in html
    assert html.count("<script") == 3
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", html)
    assert "@import" not in html
    assert "url(" not in html


def test_margins_of_probes_and_sentinels_share_an_axis_with_the_limit_1():
    run = troubled()
    (margins,) = [
        c for c in data_of(page(run, verdict_of(run)))["charts"] if c["name"] == "margins"
    ]
    assert margins["limit"] == 1
    along, of_probes = margins["series"]
    assert margins["steps"] == [0, 20, 40, 80]
    assert along["values"] == [None, 0.5, 1.1, pytest.approx(2 / 7, rel=1e-4)]
    assert along["errors"][1] == pytest.approx(0.05)
    assert of_probes["values"][0] == pytest.approx(0.325)


def test_the_verdict_says_what_was_advised_and_whether_it_was_followed():
    verdict = verdict_of(troubled())
    assert verdict.severity == "warning"
    assert "The first was gradient_margin at step 40." in verdict.sentence
    assert verdict.sentence.endswith("A learning rate of 0.031 was advised, and followed.")
    assert [f.words for f in verdict.followed] == ["yes, from step 80 on"]
    ignored = replace(troubled(), looks=(), records=troubled().records[:2])
    assert [f.words for f in verdict_of(ignored).followed] == ["no: never down to 0.031"]
    assert verdict_of(healthy()).sentence.startswith("Healthy: 20 steps, 1 probes, 2 looks, no")
    assert "Nothing was recorded" in verdict_of(Run()).sentence


def test_a_hundred_thousand_looks_keep_their_extremes_in_a_small_page(tmp_path):
    looks = [look(t, 1.0 + 0.5 * math.sin(t / 500)) for t in range(100_000)]
    looks[31_416] = look(31_416, 70.0)
    run = Run(looks=tuple(looks))
    write_page(run, tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert len(text) < 4_000_000
    chart = next(c for c in data_of(text)["charts"] if c["name"] == "margins")
    assert chart["series"][0]["values"][chart["steps"].index(31_416)] == 10.0
    assert max(len(c["steps"]) for c in data_of(text)["charts"]) <= 1502


# The commands


def test_report_writes_a_page_and_its_status_is_for_ci(tmp_path, capsys):
    path = written(troubled(), tmp_path / "run.jsonl")
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.startswith("Trouble: ")
    assert (tmp_path / "run.html").is_file()
    assert main(["report", str(path), "--fail-on", "warning"]) == 1
    assert main(["report", str(path), "--fail-on", "critical"]) == 0
    assert main(["report", str(tmp_path / "none.jsonl")]) == 2


def test_what_can_be_read_of_a_torn_file_is_shown_with_the_line_that_can_not(tmp_path, capsys):
    path = written(troubled(), tmp_path / "run.jsonl")
    path.write_bytes(path.read_bytes()[:-40] + b'\n{"kind": "wonder", "schema": 9}\n')
    assert main(["report", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Trouble: ")
    assert "run.jsonl, line 9: it is no whole JSON" in said.err
    assert "run.jsonl, line 10: its kind is 'wonder'" in said.err
    assert "<li>line 10: " in (tmp_path / "run.html").read_text(encoding="utf-8")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert main(["report", str(empty)]) == 3


def test_a_sheet_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = written(troubled(), tmp_path / "run.jsonl")
    assert main(["report", str(path), "--png"]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_compare_says_what_differs_and_lays_curves_in_one_another(tmp_path, capsys):
    first = written(troubled(), tmp_path / "first.jsonl")
    second = written(healthy(), tmp_path / "second.jsonl")
    out = tmp_path / "both.html"
    assert main(["compare", str(first), str(second), "--out", str(out)]) == 0
    head, one, other, _ = capsys.readouterr().out.splitlines()
    columns = "run", "steps", "first alert", "alerts", "peak margin", "last loss", "optimizer"
    assert tuple(re.split("  +", head)) == columns
    assert one.startswith("first   80     gradient_margin at 40  1")
    assert other.startswith("second  80     -")
    labels = [s["label"] for c in data_of(out.read_text("utf-8"))["charts"] for s in c["series"]]
    assert {"first: loss", "second: loss"} <= set(labels)
    assert compare({"a": healthy()})[1][2] == "-"


def test_tail_shows_a_run_as_it_stands_and_follows_it_to_its_end(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    assert main(["tail", str(written(troubled(), path)), "--once"]) == 0
    assert "margin of 1 " in capsys.readouterr().out
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b'{"kind": "end"')])
    rests = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if len(rests) == 2:
            path.write_bytes(whole)

    follow(path, rest=rest)
    assert len(rests) == 2
    assert capsys.readouterr().out.count("Trouble: ") == 2


def test_blocks_keep_the_largest_of_a_stretch_and_mark_what_is_not_finite():
    assert spark([0.0, 1.0, 0.5]) == "▁█▄"
    assert spark([0.0] * 59 + [5.0, 0.0], width=31).count("█") == 1
    assert spark([1.0, math.nan]) == "▁×"
    assert "last alert  step 41" in glance(Run(alerts=(alert(),)))


def test_doctor_is_asked_for_a_function(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def watched():\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    return model, lambda m, b: m(b).pow(2).mean(), torch.ones(4, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "mine:watched"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(["doctor", "mine:nothing"]) == 2
    assert capsys.readouterr().err.endswith("Write:\n    geomwatch doctor train:watched\n")


def test_help_has_examples():
    shown = subprocess.run(
        [sys.executable, "-m", "geomwatch", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "geomwatch report run.jsonl --fail-on critical" in shown
    assert "exit status" in shown


def test_the_charts_of_a_file_are_those_of_the_run(tmp_path):
    run = troubled()
    again = read(written(run, tmp_path / "run.jsonl"))
    assert [c.name for c in charts_of(again)] == [c.name for c in charts_of(run)]
    assert isinstance(again.alerts[0], Alert)
