"""What leaves a run: lines of JSON, lines of the log, and numbers as people write them."""

from __future__ import annotations

import copy
import errno
import json
import logging
import math
import os
import pickle
import re
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_lines import alert, lines_of, record, watched_run

from geomwatch import Adjustment, Alert, Estimate, JsonLines
from geomwatch.records import SCHEMA, format_estimate
from geomwatch.sinks import (
    Line,
    Log,
    adjustment_line,
    alert_line,
    end_line,
    logger,
    read,
    record_line,
    run_line,
)

# JSON Lines


def test_a_run_is_a_line_of_provenance_then_records_and_alerts(tmp_path):
    path = tmp_path / "run.jsonl"
    monitor = watched_run(path, lr=20.0)
    lines = lines_of(path)
    assert [line["kind"] for line in lines].count("run") == 1
    assert lines[0]["kind"] == "run"
    assert lines[-1]["kind"] == "end"
    assert {line["kind"] for line in lines} == {"run", "record", "look", "alert", "end"}
    assert {line["schema"] for line in lines} == {SCHEMA}
    records = [line for line in lines if line["kind"] == "record"]
    assert [line["step"] for line in records] == [r.step for r in monitor.history]
    alerts = [line for line in lines if line["kind"] == "alert"]
    assert [line["message"] for line in alerts] == [a.message for a in monitor.alerts]


def test_the_run_line_says_what_ran(tmp_path):
    watched_run(tmp_path / "run.jsonl", every=30, seed=5)
    line = lines_of(tmp_path / "run.jsonl")[0]
    assert line["torch"] == torch.__version__
    assert line["optimizer"] == "SGD momentum 0.9"
    assert line["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert (line["every"], line["budget"], line["seed"]) == (30, None, 5)
    assert "lambda_max" in line["quantities"]


def test_a_record_line_holds_every_estimate_in_full(tmp_path):
    monitor = watched_run(tmp_path / "run.jsonl")
    (last,) = (
        line
        for line in lines_of(tmp_path / "run.jsonl")
        if (line["kind"], line.get("step")) == ("record", 3)
    )
    told = monitor.history[-1]
    assert last["loss"] == told.loss
    assert last["lr"] == list(told.lr)
    assert last["provenance"] == dict(told.provenance)
    assert set(last["estimates"]) == set(told)
    for name, found in last["estimates"].items():
        assert Estimate(**found) == told[name]
    assert "alerts" not in last  # they have lines of their own


def test_an_alert_line_holds_the_alert_in_full(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(alert_line(alert()))
    assert lines_of(sink.path) == [
        {
            "kind": "alert",
            "schema": SCHEMA,
            "rule": "stability_margin",
            "severity": "warning",
            "message": "the margin is 0.7",
            "value": 0.7,
            "limit": 0.5,
            "step": 41,
            "layers": ["head (80%)"],
            "advised_lr": None,
        }
    ]


def test_an_adjustment_line_holds_the_adjustment_in_full(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(adjustment_line(Adjustment("lr_scale", 1.0, 0.5, "the margin", 7, "dry run")))
    assert lines_of(sink.path) == [
        {
            "kind": "adjustment",
            "schema": SCHEMA,
            "knob": "lr_scale",
            "before": 1.0,
            "after": 0.5,
            "reason": "the margin",
            "step": 7,
            "effect": "dry run",
        }
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null(value, tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    estimates = {"lambda_max": Estimate(1.0, value)}
    sink(record_line(record(loss=value, lr=(value, 0.1), estimates=estimates)))
    sink(alert_line(alert(value=value, limit=math.inf)))
    told, warned = lines_of(sink.path)
    assert told["loss"] is None
    assert told["lr"] == [None, 0.1]
    assert told["estimates"]["lambda_max"]["error"] is None
    assert (warned["value"], warned["limit"]) == (None, None)


def test_the_directory_is_made_and_the_file_is_there_only_once_there_is_a_line(tmp_path):
    sink = JsonLines(tmp_path / "runs" / "first" / "run.jsonl")
    assert not (tmp_path / "runs").exists()
    sink(run_line({"seed": 0}))
    assert lines_of(sink.path) == [{"kind": "run", "schema": SCHEMA, "seed": 0}]


def test_a_path_is_appended_to_and_never_cut(tmp_path):
    path = tmp_path / "run.jsonl"
    for seed in (1, 2):
        sink = JsonLines(str(path))
        sink(run_line({"seed": seed}))
        sink(run_line({"seed": 10 * seed}))
    assert [line["seed"] for line in lines_of(path)] == [1, 10, 2, 20]


def test_each_line_is_on_disk_at_once(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    for count in (1, 2, 3):
        sink(run_line({}))
        assert len(lines_of(sink.path)) == count


def test_a_relative_path_stays_where_it_was_when_the_program_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sink = JsonLines("run.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink(run_line({}))
    assert len(lines_of(tmp_path / "run.jsonl")) == 1


def test_a_line_that_cannot_be_written_leaves_the_file_whole(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(run_line({}))
    with pytest.raises(TypeError, match="object is not JSON serializable"):
        sink(run_line({"model": object()}))
    sink(run_line({}))
    assert len(lines_of(sink.path)) == 2


def test_greek_letters_stay_readable_in_the_file(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(alert_line(alert(message="λ_max 70 ± 2\nsecond line")))
    assert "λ_max 70 ± 2" in sink.path.read_text(encoding="utf-8")
    assert len(lines_of(sink.path)) == 1


# Log


@pytest.mark.parametrize(
    ("severity", "level"),
    [("info", logging.INFO), ("warning", logging.WARNING), ("critical", logging.CRITICAL)],
)
def test_an_alert_is_logged_at_the_level_of_its_severity(severity, level, caplog):
    caplog.set_level(logging.DEBUG, "geomwatch")
    Log()(alert_line(alert(severity)))
    assert caplog.record_tuples == [("geomwatch", level, "step 41: the margin is 0.7")]


def test_a_record_is_one_line_at_info(caplog):
    caplog.set_level(logging.DEBUG, "geomwatch")
    Log()(record_line(record()))
    assert caplog.record_tuples == [
        (
            "geomwatch",
            logging.INFO,
            "step     40  loss 0.5        lr 0.1       margin 0.33±0.01     of 1  λ_max 12.3±0.4",
        )
    ]


def test_a_record_of_a_broken_run_can_be_logged(caplog):
    caplog.set_level(logging.DEBUG, "geomwatch")
    Log()(record_line(record(loss=math.nan, lr=(), estimates={})))
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.split() == "step 40 loss nan lr - margin - of 1 λ_max -".split()  # noqa: SIM905


def test_what_is_lost_in_noise_or_held_is_no_number_of_the_log(caplog):
    caplog.set_level(logging.DEBUG, "geomwatch")
    estimates = {
        "stability_margin": Estimate(0.33, 0.2, "residual"),
        "lambda_max": Estimate(12.0, 0.1, "residual", status="held", age=20),
    }
    Log()(record_line(record(estimates=estimates)))
    assert "margin -             of 1  λ_max -" in caplog.text


def test_lines_of_probes_are_as_wide_as_another_and_below_100_columns(caplog):
    caplog.set_level(logging.DEBUG, "geomwatch")
    wide = {
        "stability_margin": Estimate(0.012345, 0.00012, "residual"),
        "lambda_max": Estimate(1.2345e7, 4321.0, "residual"),
        "grad_norm": Estimate(123.4),
    }
    for line in (record(), record(step=123456, loss=0.00012345, lr=(1.25e-5,), estimates=wide)):
        Log()(record_line(line))
    first, second = (r.getMessage() for r in caplog.records)
    assert first.index("λ_max") == second.index("λ_max")
    assert max(len(first), len(second)) < 100


def test_a_run_says_when_it_begins_and_what_became_of_it(caplog):
    caplog.set_level(logging.INFO, "geomwatch")
    facts = {"parameters": 8970, "optimizer": "SGD", "every": None, "budget": 0.02}
    Log()(run_line(facts))
    lowered = alert("critical", advised_lr=0.06)
    for alerts in ([], [lowered]):
        end = end_line(300, 1.0, 0.019, records=[record()], alerts=alerts, lr=(0.28,))
        Log()(end)
    start, calm, troubled = caplog.records
    assert "watching 8,970 parameters under SGD, within 0.02 of the time" in start.getMessage()
    assert (calm.levelno, troubled.levelno) == (logging.INFO, logging.WARNING)
    assert calm.getMessage() == (
        "end at step 300: no alerts; last stability margin 0.33 of 1; cost 1.9% of the time of "
        "training"
    )
    assert "alerts: 1 critical, the last at step 41;" in troubled.getMessage()
    assert troubled.getMessage().endswith("the advice to go down to 0.06 was not followed")


def test_a_bar_of_tqdm_is_cleared_while_a_line_is_logged(capfd):
    tqdm = pytest.importorskip("tqdm").tqdm
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    with tqdm(total=3, mininterval=0) as bar:
        bar.update()
        capfd.readouterr()
        logger.warning("lower the rate")
        written = capfd.readouterr().err
    logger.removeHandler(handler)
    before, said, after = written.partition("lower the rate\n")
    assert before.endswith("\r")
    assert "33%" not in before
    assert said
    assert "33%" in after


def test_a_monitor_logs_its_records_without_being_asked(caplog, tmp_path):
    caplog.set_level(logging.INFO, "geomwatch")
    watched_run(tmp_path / "run.jsonl")
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    start, *probes, end = texts
    assert start.startswith("geomwatch ")
    assert end.startswith("end at step 4: no alerts; ")
    assert [text.split()[1] for text in probes] == ["0", "1", "2", "3"]
    assert re.fullmatch(
        r"step +0  loss \d\.\d+ +lr 0\.05 +margin \S+±\S+ +of 1  λ_max \S+±\S+",
        probes[0],
    )


# Numbers


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (12.34, 0.41, "12.3 ± 0.4"),
        (68.0, 21.0, "68 ± 21"),
        (-12.34, 0.41, "-12.3 ± 0.4"),
        (0.325, 0.011, "0.33 ± 0.01"),
        (1234.5, 21.0, "1234 ± 21"),
        (54321.0, 900.0, "54321 ± 900"),
        (3.0, 21.0, "3 ± 21"),
        (0.0, 0.02, "0.00 ± 0.02"),
        # an error below the fourth digit is not worth showing
        (12.3456, 1e-9, "12.35"),
        (9999.0, 0.01, "9999"),
        # without an error
        (68.0, None, "68.0"),
        (1234.5, 0.0, "1234"),
        (0.00123456, None, "0.00123"),
        (0.0, None, "0"),
        (-0.5, None, "-0.500"),
        (5.0, math.inf, "5.00"),
        (5.0, math.nan, "5.00"),
        # tiny and huge
        (1.234e-7, 4.1e-9, "(1.23 ± 0.04)e-7"),
        (-1.234e-7, 4.1e-9, "(-1.23 ± 0.04)e-7"),
        (1e-9, 2e-7, "(0 ± 2)e-7"),
        (1.234e8, 2.1e7, "(1.2 ± 0.2)e8"),
        (123456.0, 20.0, "1.235e5"),
        (2.5e-300, None, "2.50e-300"),
        (1.7e308, 1e307, "(1.7 ± 0.1)e308"),
        (5e-324, None, "4.94066e-324"),
        (math.inf, None, "inf"),
        (math.nan, 0.1, "nan"),
        (None, None, "n/a"),
    ],
)
def test_an_estimate_is_written_to_the_digit_of_its_error(value, error, text):
    assert format_estimate(Estimate(value, error, "residual")) == text


def test_value_and_error_never_differ_in_notation():
    for exponent in range(-12, 13):
        for share in (1e-5, 0.003, 0.04, 0.5, 7.0, 300.0):
            for lead in (1.0, 2.5, 9.999):
                value = lead * 10.0**exponent
                text = format_estimate(Estimate(value, share * value, "residual"))
                plain = re.fullmatch(r"\(?(-?[\d.]+)(?: ± ([\d.]+))?\)?(?:e(-?\d+))?", text)
                assert plain, text  # above all no 2e+01
                scale = 10.0 ** int(plain[3] or 0)
                shown, wide = float(plain[1]) * scale, float(plain[2] or 0) * scale
                assert abs(shown - value) <= max(0.501 * share, 0.0006) * value, text
                if plain[2]:
                    assert wide == pytest.approx(share * value, rel=0.5), text


# Faults


class FullDisk(FileIO):
    """Writes what there is room for, then raises as a full disk does."""

    room = 10**9

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(bytes(data)[: self.room])
        FullDisk.room -= written
        return written


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr("geomwatch.sinks.json_lines.FileIO", FullDisk)
    monkeypatch.setattr(FullDisk, "room", 10**9)
    return FullDisk


def test_after_a_torn_line_the_next_starts_on_its_own(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"kind": "record", "step": 100, "lo')
    sink = JsonLines(path)
    sink(run_line({"seed": 1}))
    with path.open("a") as file:
        file.write('{"kind": "rec')  # by another process, say, that was killed
    sink(run_line({"seed": 2}))
    assert [json.loads(path.read_text().splitlines()[i])["seed"] for i in (1, 3)] == [1, 2]


def test_after_a_full_disk_the_next_line_starts_on_its_own(tmp_path, full_disk):
    sink = JsonLines(tmp_path / "run.jsonl")
    full_disk.room = 50
    sink(run_line({}))
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            sink(run_line({"seed": 1}))
    full_disk.room = 10**9
    sink(run_line({"seed": 2}))
    found = read(sink.path)
    assert [run.get("seed") for run in found.runs] == [None, 2]
    assert [lost.line for lost in found.lost] == [2]


def test_lines_that_a_sink_loses_are_counted_and_told(tmp_path, caplog):
    told: list[Line] = []

    def failing(line: Line) -> None:
        told.append(line)
        if 2 <= len(told) <= 4:
            raise OSError("no answer")

    monitor = watched_run(tmp_path / "run.jsonl", quantities="loss", also_to=failing)
    assert len(told) > len(monitor.history) == 4
    assert (told[-1]["kind"], told[-1]["lost"]) == ("end", 3)
    assert lines_of(tmp_path / "run.jsonl")[-1]["lost"] == 0
    first, last = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert "failed with OSError: no answer" in first
    assert last.endswith("has lost 3 lines of this run.")


def test_the_time_of_a_slow_sink_is_in_the_account(tmp_path, monkeypatch):
    now = 0.0

    def slow(line: Line) -> None:
        nonlocal now
        now += 10.0

    monkeypatch.setattr("geomwatch.monitoring.budget.clock", lambda: now)
    monitor = watched_run(tmp_path / "run.jsonl", quantities="loss", also_to=slow)
    assert monitor.seconds == 10.0 * (1 + len(monitor.history) + len(monitor.looks))


def test_a_file_that_is_moved_away_is_made_anew(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(run_line({"seed": 1}))
    sink.path.rename(tmp_path / "run.1.jsonl")
    sink(run_line({"seed": 2}))
    sink.path.unlink()
    sink(run_line({"seed": 3}))
    assert [line["seed"] for line in lines_of(sink.path)] == [3]
    assert [line["seed"] for line in lines_of(tmp_path / "run.1.jsonl")] == [1]


def test_one_handle_is_open_and_a_copy_has_its_own(tmp_path, monkeypatch):
    opened: list[Path] = []
    monkeypatch.setattr(
        "geomwatch.sinks.json_lines.FileIO", lambda *a: opened.append(a[0]) or FileIO(*a)
    )
    sink = JsonLines(tmp_path / "run.jsonl")
    for seed in range(5):
        sink(run_line({"seed": seed}))
    assert len(opened) == 1
    for copied in (copy.deepcopy(sink), pickle.loads(pickle.dumps(sink))):
        copied(run_line({"seed": 5}))
    sink.close()
    sink(run_line({"seed": 6}))
    assert [line["seed"] for line in lines_of(sink.path)] == [0, 1, 2, 3, 4, 5, 5, 6]


@pytest.mark.parametrize("unsafe", ["\x00", "\x1b[2J", "\r", "\x85", "\u2028", "\u202e", "\ud800"])
def test_no_name_breaks_a_line_of_file_or_log(unsafe, tmp_path, caplog):
    caplog.set_level(logging.INFO, "geomwatch")
    name = f"layer{unsafe}CRITICAL geomwatch: all is lost"
    line = alert_line(alert(message=name, layers=(name,)))
    JsonLines(tmp_path / "run.jsonl")(line)
    assert lines_of(tmp_path / "run.jsonl") == [{**line, "layers": [name]}]
    Log()(line)
    (said,) = (r.getMessage() for r in caplog.records)
    assert unsafe not in said
    assert len(said.splitlines()) == 1


def test_further_lines_of_a_message_cannot_pass_for_entries_of_the_log(caplog):
    logger.warning("module %r and %s", "a\nb", "net\nCRITICAL geomwatch: all is lost")
    assert caplog.messages == ["module 'a\\nb' and net\n    CRITICAL geomwatch: all is lost"]


def test_numbers_of_other_libraries_are_written_as_numbers(tmp_path):
    sink = JsonLines(tmp_path / "run.jsonl")
    sink(run_line({"a": np.float32(0.5), "b": np.int64(7), "c": torch.tensor(2.0), "d": True}))
    assert lines_of(sink.path) == [run_line({"a": 0.5, "b": 7, "c": 2.0, "d": True})]


# One process of many


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_zero_speaks(rank, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, "geomwatch")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
    told: list[Alert] = []
    monitor = watched_run(tmp_path / "run.jsonl", lr=20.0, on_alert=told.append)
    assert monitor.history  # measured on every rank
    assert monitor.alerts
    spoken = [(tmp_path / "run.jsonl").exists(), bool(told), bool(caplog.records)]
    assert spoken == [rank == 0] * 3
