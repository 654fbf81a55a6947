"""Metrics in real trackers, through accelerate's log_with: each probe once, at its step."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from problems import cross_entropy, digits, mlp
from torch.optim import SGD
from trackers import Scalars, mlflow_scalars, tensorboard_scalars, wandb_scalars

from geomwatch import Measurement, Record
from geomwatch.integrations.accelerate import watch

STEPS = [0, 3, 6]


def train(accelerator, prefix: str = "geom/") -> list[Record]:
    """Eight optimizer steps of two micro-batches, with the user's own metric at each step."""
    accelerator.init_trackers("digits", config={"lr": 0.05})
    model = mlp(64, 8, 10)
    model, optimizer = accelerator.prepare(model, SGD(model.parameters(), lr=0.05))
    monitor = watch(
        accelerator,
        model,
        cross_entropy,
        optimizer,
        how=Measurement(per_layer=True),
        every=3,
        prefix=prefix,
    )
    inputs, targets = digits(256)
    for i, batch in enumerate(zip(inputs.split(16), targets.split(16), strict=True)):
        with accelerator.accumulate(model):
            loss = cross_entropy(model, batch)
            accelerator.backward(loss)
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            accelerator.log({"loss": loss.item()}, step=i // 2)
    monitor.close()
    accelerator.end_training()
    assert [record.step for record in monitor.history] == STEPS
    return monitor.history


def expect(found: Scalars, history: list[Record]) -> None:
    """Compare what a tracker holds, (step, value) by key, with the records."""
    expected = defaultdict(list)
    for record in history:
        for key, value in record.scalars().items():
            expected[key].append((record.step, value))
    geom = {key: rows for key, rows in found.items() if key.startswith("geom/")}
    assert geom.keys() == expected.keys()
    assert {"geom/lambda_max", "geom/lambda_max_error", "geom/trace.2"} <= geom.keys()
    for key, rows in geom.items():
        assert [step for step, _ in rows] == [step for step, _ in expected[key]], key
        assert [v for _, v in rows] == pytest.approx([v for _, v in expected[key]], rel=1e-6), key
    assert [step for step, _ in found["loss"]] == list(range(8))  # the user's own, untouched


def test_tensorboard_gets_each_probe_once_at_its_step(make_accelerator, tmp_path):
    accelerator = make_accelerator(
        gradient_accumulation_steps=2, log_with="tensorboard", project_dir=tmp_path
    )
    history = train(accelerator)
    expect(tensorboard_scalars(tmp_path / "digits"), history)


def test_wandb_offline_gets_each_probe_once_at_its_step(make_accelerator, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    accelerator = make_accelerator(gradient_accumulation_steps=2, log_with="wandb")
    history = train(accelerator)
    expect(wandb_scalars(tmp_path), history)


def test_an_mlflow_file_store_gets_each_probe_once_at_its_step(make_accelerator, mlflow_store):
    accelerator = make_accelerator(gradient_accumulation_steps=2, log_with="mlflow")
    history = train(accelerator)
    expect(mlflow_scalars(mlflow_store, "digits"), history)


class CsvTracker(GeneralTracker):
    """A tracker of one's own: a row for each call of accelerator.log."""

    name = "csv"
    requires_logging_directory = False

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows([step, key, value] for key, value in values.items())


def test_a_tracker_of_ones_own_gets_each_probe_once_at_its_step(make_accelerator, tmp_path):
    path = tmp_path / "metrics.csv"
    accelerator = make_accelerator(gradient_accumulation_steps=2, log_with=CsvTracker(path))
    history = train(accelerator)
    found = defaultdict(list)
    with path.open(newline="") as file:
        for step, key, value in csv.reader(file):
            found[key].append((int(step), float(value)))
    expect(found, history)


def test_the_prefix_of_metrics_can_be_chosen(make_accelerator, tmp_path):
    path = tmp_path / "metrics.csv"
    accelerator = make_accelerator(gradient_accumulation_steps=2, log_with=CsvTracker(path))
    train(accelerator, prefix="train/geometry/")
    assert "train/geometry/lambda_max" in path.read_text()
    assert "geom/" not in path.read_text()
