"""The kit's train.py: a plain torch loop with all that real ones have."""

from __future__ import annotations

import functools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import cross_entropy, digits
from torch import nn

import geomwatch

TRAIN = Path(__file__).with_name("train.py")


@pytest.fixture
def train(monkeypatch):
    """Return `run(out, *arguments)`, which runs train.py in this process; returns what it left."""

    def run(out: Path, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [str(TRAIN), "--out", str(out), *arguments])
        return runpy.run_path(str(TRAIN), run_name="__main__")

    return run


def records(out: Path) -> list[dict[str, Any]]:
    text = (out / "records.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0]["kind"] == "run"
    alerts = [line for line in lines if line["kind"] == "alert"]
    assert not [alert for alert in alerts if alert["severity"] != "info"]
    return [line for line in lines if line["kind"] == "record"]


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def checkpoint(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoint.pt", weights_only=True)


def test_train_prints_what_it_measures(tmp_path):
    run = subprocess.run(
        [sys.executable, str(TRAIN), "--out", str(tmp_path), "--steps=60", "--every=20"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "INFO     step      0  loss 2." in run.stdout
    assert "WARNING" not in run.stdout
    found = records(tmp_path)
    assert [record["step"] for record in found] == [0, 20, 40]
    assert all(record["provenance"]["items"] == 2 * 32 for record in found)
    assert found[-1]["loss"] < 0.2 < found[0]["loss"]


@pytest.mark.parametrize(
    ("precision", "scale"), [("fp32", 1.0), ("bf16", 1.0), ("fp16", 2.0**10), ("fp16", 2.0**20)]
)
def test_training_is_bit_identical_when_watched(train, tmp_path, monkeypatch, precision, scale):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=scale)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    arguments = ("--steps=24", "--every=5", "--checkpoint=24", f"--precision={precision}")
    train(tmp_path / "on", *arguments)
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    train(tmp_path / "off", *arguments)
    on, off = checkpoint(tmp_path / "on"), checkpoint(tmp_path / "off")
    taken = on.pop("monitor")["step"]
    assert off.pop("monitor")["step"] == 0
    assert on.keys() == {"model", "optimizer", "scaler", "step", "rng"}
    assert same(on, off)
    if scale > 2**15:  # the first steps are left out, and probed once all the same
        assert on["scaler"]["scale"] < scale
        assert taken < on["step"] == 24
    else:
        assert taken == 24
    steps = [record["step"] for record in records(tmp_path / "on")]
    assert steps == [step for step in (0, 5, 10, 15, 20) if step < taken]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(train, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    arguments = ("--steps=30", "--every=6")
    train(whole, *arguments, "--checkpoint=9")
    train(rest, *arguments, "--resume", str(whole / "checkpoint.pt"))
    late = [record for record in records(whole) if record["step"] >= 9]
    resumed = records(rest)
    assert [r["step"] for r in resumed] == [r["step"] for r in late] == [12, 18, 24]
    for record, expected in zip(resumed, late, strict=True):
        assert record["loss"] == expected["loss"]
        one, other = (r["estimates"]["stability_margin"] for r in (record, expected))
        assert one["value"] == pytest.approx(other["value"], rel=1e-3)
    first, second = (torch.load(out / "model.pt", weights_only=True) for out in (whole, rest))
    assert same(first, second)


def test_lambda_max_is_that_of_measure_on_the_same_window():
    inputs, targets = digits(48)
    torch.manual_seed(0)
    model = nn.Sequential(  # ten parameters, few enough for Lanczos to be exact
        nn.Unflatten(1, (1, 8, 8)), nn.AvgPool2d(4), nn.Flatten(), nn.Linear(4, 2), nn.Tanh()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    monitor = geomwatch.Monitor(model, cross_entropy, optimizer)
    losses = []
    for batch in zip(inputs.split(16), (targets % 2).split(16), strict=True):
        loss = cross_entropy(model, batch)
        (loss / 3).backward()
        monitor.observe(batch)
        losses.append(loss.item())
    record = monitor.step()
    expected = geomwatch.measure(model, cross_entropy, (inputs, targets % 2), optimizer=optimizer)
    assert record.loss == pytest.approx(sum(losses) / 3, rel=1e-6)
    for name in ("lambda_max", "stability_margin"):
        # differences on one side
        assert record[name].value == pytest.approx(expected[name].value, rel=2e-3)
        assert record[name].value > 0
