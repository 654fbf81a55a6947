"""The kit's train.py as torchrun starts it, and its parts on one process and two."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from states import same

TRAIN = Path(__file__).with_name("train.py")
ranks.preload("torch.distributed.checkpoint.state_dict")


def scene(rank: int, watching: bool, arguments: tuple[str, ...]) -> None:
    if not watching:
        os.environ["GEOMWATCH_DISABLE"] = "1"
    sys.argv = [str(TRAIN), *arguments]
    runpy.run_path(str(TRAIN), run_name="__main__")


def train(out: Path, *arguments: str, size: int = 2, watching: bool = True) -> list[Any]:
    """Run train.py on so many ranks; return the records it has left."""
    out.mkdir(exist_ok=True)
    given = ("--out", str(out), *arguments)
    for outcome in ranks.play(scene, out, watching, given, size=size, group=False):
        assert not outcome.error, outcome.error
        assert not outcome.is_gone
    return records(out) if watching else []


def records(out: Path) -> list[dict[str, Any]]:
    text = (out / "records.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["kind"] for line in lines].count("run") == 1  # of one rank
    alerts = [line for line in lines if line["kind"] == "alert"]
    assert not [alert for alert in alerts if alert["severity"] != "info"]
    return [line for line in lines if line["kind"] == "record"]


def state(out: Path) -> dict[str, Any]:
    found = torch.load(out / "last.pt", weights_only=True)
    return {key: found[key] for key in ("model", "optimizer", "step")}


def value(record: dict[str, Any], name: str) -> float:
    return record["estimates"][name]["value"]


def test_train_prints_what_it_measures(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [
            *torchrun,
            "--nproc_per_node=2",
            str(TRAIN),
            "--out",
            str(tmp_path),
            "--steps=30",
            "--every=10",
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert run.stdout.count("INFO     step      0  loss 2.") == 1
    assert "WARNING" not in run.stdout
    found = records(tmp_path)
    assert [record["step"] for record in found] == [0, 10, 20]
    assert all((r["provenance"]["ranks"], r["provenance"]["items"]) == (2, 2 * 16) for r in found)
    assert found[-1]["loss"] < 0.5 < found[0]["loss"]


@pytest.mark.parametrize("sharing", [("--norm=batch",), ("--shard",)])
def test_training_is_bit_identical_when_watched(tmp_path, sharing):
    found = train(tmp_path / "on", "--steps=6", *sharing)
    train(tmp_path / "off", "--steps=6", *sharing, watching=False)
    assert same(state(tmp_path / "on"), state(tmp_path / "off"))
    assert state(tmp_path / "on")["step"] == 6
    per_rank = found[0]["provenance"].get("batch_statistics")
    assert per_rank == ("of each rank's own batch" if sharing == ("--norm=batch",) else None)


def test_ranks_measure_what_one_process_does(tmp_path):
    one = train(tmp_path / "one", "--steps=3", "--every=1", "--batch=32", size=1)
    for name, sharing, tolerance in (("two", (), 1e-4), ("cut", ("--shard",), 1e-2)):
        found = train(tmp_path / name, "--steps=3", "--every=1", *sharing)
        assert [record["step"] for record in found] == [0, 1, 2]
        for quantity in ("loss", "grad_norm", "lambda_max", "stability_margin"):
            expected = value(one[0], quantity)
            assert value(found[0], quantity) == pytest.approx(expected, rel=tolerance), quantity
        assert found[2]["loss"] == pytest.approx(one[2]["loss"], rel=1e-4)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    arguments = ("--steps=14", "--every=6")
    late = train(whole, *arguments, "--checkpoint=7")
    resumed = train(rest, *arguments, "--resume", str(whole / "checkpoint.pt"))
    late = [record for record in late if record["step"] >= 7]
    assert [r["step"] for r in resumed] == [r["step"] for r in late] == [12]
    assert resumed[0]["loss"] == late[0]["loss"]
    expected = value(late[0], "stability_margin")
    assert value(resumed[0], "stability_margin") == pytest.approx(expected, rel=0.05)
    assert same(state(whole), state(rest))
