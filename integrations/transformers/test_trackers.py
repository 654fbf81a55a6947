"""Metrics go where the Trainer's own go: each probe once, at its step, and nothing is lost."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import transformers
from trackers import Scalars, mlflow_scalars, tensorboard_scalars, wandb_scalars
from trainers import make, sentences

from geomwatch import Measurement, Monitor
from geomwatch.integrations.transformers import GeomwatchCallback


def train(folder: Path, **options: Any) -> tuple[Any, Monitor]:
    callback = GeomwatchCallback(how=Measurement(per_layer=True), every=3)
    trainer = make(folder, callback, **options)
    trainer.train()
    # with every third step, those that a sentinel has asked for
    assert {0, 3, 6} <= {record.step for record in callback.monitor.history}
    return trainer, callback.monitor


def expected(monitor: Monitor) -> Scalars:
    """What was measured at each step, without the values that are held from an earlier one."""
    found = defaultdict(list)
    for look in monitor.looks:
        for key, value in look.scalars().items():
            found[key].append((look.step, pytest.approx(value, rel=1e-6)))
    for record in monitor.history:
        held = {f"geom/{n}".replace("/", ".") for n, e in record.estimates.items() if e.age}
        for key, value in record.scalars().items():
            if key.removesuffix("_error").replace("/", ".") not in held:
                found[key].append((record.step, pytest.approx(value, rel=1e-6)))
    assert len(found["geom/stability_margin"]) == len(monitor.history)
    assert len(found["geom/lambda_max"]) == 1  # of Adam's Hessian at every tenth probe
    return dict(found)


def geometry(found: Scalars, prefix: str = "train/") -> Scalars:
    keys = {key for key in found if key.startswith(f"{prefix}geom/")}
    return {key.removeprefix(prefix): found[key] for key in keys}


def test_log_history_has_each_probe_once_beside_the_losses(tmp_path):
    trainer, monitor = train(tmp_path)
    found = defaultdict(list)
    for entry in trainer.state.log_history:
        for key, value in entry.items():
            found[key].append((entry["step"], value))
    assert geometry(found, "") == expected(monitor)
    assert [step for step, _ in found["loss"]] == list(range(1, 9))
    assert [step for step, _ in found["grad_norm"]] == list(range(1, 9))


def test_tensorboard_gets_each_probe_once_at_its_step(tmp_path):
    _, monitor = train(tmp_path, report_to="tensorboard")
    (folder,) = (tmp_path / "runs").iterdir()
    found = tensorboard_scalars(folder)
    assert geometry(found) == expected(monitor)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))


def test_wandb_offline_gets_each_probe_once_at_its_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    _, monitor = train(tmp_path, report_to="wandb")
    import wandb

    wandb.finish()
    rows = wandb_scalars(tmp_path)
    # a Trainer logs without a step, and its own step as a metric
    steps = dict(rows["train/global_step"])
    found = {key: [(steps[row], value) for row, value in rows[key]] for key in rows}
    assert geometry(found) == expected(monitor)
    assert [step for step, _ in found["train/loss"]] == list(range(1, 9))


def test_mlflow_gets_each_probe_once_at_its_step(mlflow_store, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "kit")
    _, monitor = train(tmp_path, report_to="mlflow")
    found = mlflow_scalars(mlflow_store, "kit")
    assert geometry(found, "") == expected(monitor)
    assert [step for step, _ in found["loss"]] == list(range(1, 9))


class Averages(transformers.Trainer):
    """Logs averages since the last time, as TRL does, and expects a loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averages: list[float] = []
        self.logged: list[tuple[int, int]] = []

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.averages.append(1.0)
        return super().compute_loss(*args, **kwargs)

    def log(self, logs, start_time=None):
        assert "loss" in logs or "train_loss" in logs
        self.logged.append((self.state.global_step, len(self.averages)))
        self.averages.clear()
        super().log(logs, start_time)


def test_a_log_of_the_users_own_is_called_for_the_users_own_metrics_only(tmp_path):
    trainer, _ = train(tmp_path, kind=Averages, logging_steps=2)
    assert trainer.logged == [(2, 2), (4, 2), (6, 2), (8, 2), (8, 0)]


class LogsEarly(transformers.TrainerCallback):
    """Asks for a log at the begin of a step, before the callback logs a probe."""

    def on_step_begin(self, args, state, control, **kwargs):
        control.should_log = state.global_step == 3


def test_a_log_that_somebody_else_has_asked_for_still_comes(tmp_path):
    callback = GeomwatchCallback(how=Measurement(quantities=["loss"]), every=3)
    trainer = make(tmp_path, callback, logging_steps=100)
    trainer.add_callback(LogsEarly())
    trainer.train()
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [4]


class OutOfReach(transformers.TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "geom/loss" in logs:
            raise ConnectionError("no network")


def test_a_tracker_that_fails_does_not_stop_the_training(tmp_path, caplog):
    callback = GeomwatchCallback(how=Measurement(quantities=["loss"]), every=4)
    trainer = make(tmp_path, [OutOfReach(), callback])
    trainer.train()
    assert trainer.state.global_step == 8
    assert "record of step 4 did not reach all trackers: ConnectionError: no net" in caplog.text


def test_the_prefix_can_be_chosen(tmp_path):
    callback = GeomwatchCallback(how=Measurement(quantities=["loss"]), every=8, prefix="curvature.")
    trainer = make(tmp_path, callback, data=sentences(8))
    trainer.train()
    keys = {key for entry in trainer.state.log_history for key in entry}
    assert "curvature.loss" in keys
    assert not any(key.startswith("geom/") for key in keys)
