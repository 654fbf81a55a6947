"""Every probe arrives once, at its step, in the trackers themselves: no stale repeats."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from trackers import Scalars, mlflow_scalars, tensorboard_scalars, wandb_scalars

from geomwatch import Measurement, Monitor
from geomwatch.integrations.lightning import GeomwatchCallback

BOTH = pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)


@pytest.fixture
def watched(Net, fit):
    """Fit 16 steps with a logger; return what ought to have arrived."""

    def run(logger: Any, *callbacks: Any) -> Scalars:
        callback = GeomwatchCallback(how=Measurement(per_layer=True), every=3)
        trained = {"logger": logger, "max_epochs": 2, "log_every_n_steps": 5}
        fit(Net(), [callback, *callbacks], **trained)
        assert [record.step for record in callback.monitor.history] == [0, 3, 6, 9, 12, 15]
        return expected(callback.monitor)

    return run


def expected(monitor: Monitor) -> Scalars:
    """What was measured at each step, without the values that are held from an earlier one."""
    found = defaultdict(list)
    records = monitor.history
    for look in monitor.looks:
        for key, value in look.scalars().items():
            found[key].append((look.step, pytest.approx(value, rel=1e-6)))
    for record in records:
        held = {f"geom/{n}".replace("/", ".") for n, e in record.estimates.items() if e.age}
        for key, value in record.scalars().items():
            if key.removesuffix("_error").replace("/", ".") not in held:
                found[key].append((record.step, pytest.approx(value, rel=1e-6)))
    assert len(found["geom/stability_margin"]) == len(records)
    assert len(found["geom/roughness"]) == 1  # at every tenth probe
    return dict(found)


def geometry(found: Scalars) -> Scalars:
    return {key: values for key, values in found.items() if key.startswith("geom/")}


def csv_scalars(file: Path) -> Scalars:
    found = defaultdict(list)
    with file.open() as lines:
        for row in csv.DictReader(lines):
            for key, value in row.items():
                if value:
                    found[key].append((int(row["step"]), float(value)))
    return found


@BOTH
def test_csv_gets_each_probe_once_at_its_step(watched, host, tmp_path):
    logger = host.loggers.CSVLogger(tmp_path)
    sent = watched(logger)
    found = csv_scalars(Path(logger.log_dir) / "metrics.csv")
    assert geometry(found) == sent
    assert [step for step, _ in found["loss_step"]] == [4, 9, 14]  # Lightning's own


@BOTH
def test_tensorboard_gets_each_probe_once_at_its_step(watched, host, tmp_path):
    logger = host.loggers.TensorBoardLogger(tmp_path)
    sent = watched(logger)
    found = tensorboard_scalars(Path(logger.log_dir))
    assert geometry(found) == sent
    assert [step for step, _ in found["loss_step"]] == [4, 9, 14]


def test_wandb_offline_gets_each_probe_once_at_its_step(watched, host, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = host.loggers.WandbLogger(save_dir=tmp_path, offline=True)
    sent = watched(logger)
    logger.experiment.finish()
    rows = wandb_scalars(tmp_path)
    steps = dict(rows["trainer/global_step"])
    found = {key: [(steps[row], value) for row, value in rows[key]] for key in rows}
    assert geometry(found) == sent
    assert [step for step, _ in found["loss_step"]] == [4, 9, 14]


def test_mlflow_gets_each_probe_once_at_its_step(watched, host, mlflow_store):
    sent = watched(host.loggers.MLFlowLogger("kit", tracking_uri=mlflow_store))
    found = mlflow_scalars(mlflow_store, "kit")
    assert geometry(found) == sent
    assert [step for step, _ in found["loss_step"]] == [4, 9, 14]


def test_several_loggers_get_the_same(Net, fit, host, tmp_path):
    loggers = [host.loggers.CSVLogger(tmp_path, name=name) for name in "ab"]
    callback = GeomwatchCallback(every=3, prefix="curvature.")
    fit(Net(), [callback], logger=loggers)
    first, second = (csv_scalars(Path(logger.log_dir) / "metrics.csv") for logger in loggers)
    assert first == second
    assert [step for step, _ in first["curvature.stability_margin"]] == [0, 3, 6]
    assert not geometry(first)


def test_a_tracker_that_fails_costs_no_training(Net, fit, host, tmp_path, caplog):
    class Unreachable(host.loggers.CSVLogger):
        def log_metrics(self, metrics, step):
            if "geom/loss" in metrics:
                raise ConnectionError("no network")

    callback = GeomwatchCallback(every=4)
    trainer = fit(Net(), [callback], logger=Unreachable(tmp_path))
    assert trainer.global_step == 8
    told = "the record of step 4 did not reach Unreachable: ConnectionError: no network"
    assert told in caplog.text
    assert "geom/loss" in trainer.callback_metrics
