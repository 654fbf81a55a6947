"""Checkpoints: the state goes in and comes back, whichever way the Trainer restores callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainers import causal, equal, make, traces

import geomwatch
from geomwatch.integrations.transformers import GeomwatchCallback

WATCH = {"every": 4}
SAVING = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}


def train(
    folder: Path, callback: GeomwatchCallback | None, *, resume: bool = False, **options: Any
) -> Any:
    torch.manual_seed(1)
    trainer = make(folder, callback, model=causal(0.1), **{**SAVING, **options})
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
    return trainer


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_measures_what_the_uninterrupted_one_does(tmp_path, restore):
    names = ["loss", "lambda_max", "stability_margin", "batch_sharpness", "trace", "difficulty"]
    whole = GeomwatchCallback(how=geomwatch.Measurement(quantities=names), **WATCH)
    slow = {"optim": "sgd", "learning_rate": 1e-2}
    expected = traces(train(tmp_path, whole, **slow))
    resumed = GeomwatchCallback(how=geomwatch.Measurement(quantities=names), **WATCH)
    trainer = train(
        tmp_path, resumed, resume=True, restore_callback_states_from_checkpoint=restore, **slow
    )
    assert equal(expected["weights"], traces(trainer)["weights"])
    (before,) = [r for r in whole.monitor.history if r.step == 8]
    (after,) = resumed.monitor.history
    assert after.step == 8
    assert after.loss == pytest.approx(before.loss, rel=1e-6)
    for name in ("lambda_max", "stability_margin", "batch_sharpness", "trace"):
        was, now = before[name], after[name]
        errors = (was.error or 0.0) + (now.error or 0.0)
        errors *= 3 if now.error_kind == "stderr" else 1  # a residual is a bound
        assert now.value == pytest.approx(was.value, rel=1e-3, abs=errors), name
    # a probe starts from the gradient, which the resumed run has as well
    assert after["stability_margin"].hvps == before["stability_margin"].hvps
    # rules, difficulty and probe count go on
    assert after["difficulty"].value == pytest.approx(before["difficulty"].value, rel=1e-3)
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    state = saved["stateful_callbacks"]["GeomwatchCallback"]["attributes"]["saved_state"]
    plan = state["watch"]["prober"]["prober"]["plan"]
    assert (state["step"], plan["probes"]) == (12, 3)


def test_what_json_can_not_hold_is_taken_from_the_users_own_callback(tmp_path):
    lines: list[dict[str, Any]] = []
    train(tmp_path, GeomwatchCallback(**WATCH, sinks=[lines.append]))
    lines.clear()
    users_own = GeomwatchCallback(**WATCH, sinks=[lines.append])
    trainer = train(tmp_path, users_own, resume=True, restore_callback_states_from_checkpoint=True)
    assert not any(held is users_own for held in trainer.callback_handler.callbacks)
    assert [line["step"] for line in lines if line["kind"] == "record"] == [8]
    assert [record.step for record in users_own.monitor.history] == [8]


def test_it_says_so_if_there_is_none(tmp_path, caplog):
    train(tmp_path, GeomwatchCallback(**WATCH, sinks=[print]))
    torch.manual_seed(1)
    options = {**SAVING, "restore_callback_states_from_checkpoint": True}
    trainer = make(tmp_path, model=causal(), **options)
    trainer.add_callback(GeomwatchCallback(**WATCH, sinks=[print]))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "was restored from a checkpoint without sinks, which JSON can't hold" in caplog.text


def test_a_callback_that_the_checkpoint_does_not_know_counts_from_there_and_is_saved(tmp_path):
    train(tmp_path, None)
    callback = GeomwatchCallback(**WATCH)
    train(tmp_path, callback, resume=True)
    assert [record.step for record in callback.monitor.history] == [6, 8]
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    assert "GeomwatchCallback" in saved["stateful_callbacks"]


@pytest.mark.parametrize("damage", ["an entry", "a tensor"])
def test_a_damaged_checkpoint_is_refused_before_training(tmp_path, damage):
    train(tmp_path, GeomwatchCallback(**WATCH))
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["GeomwatchCallback"]["attributes"]["saved_state"]
    if damage == "an entry":
        del saved["watch"]
    else:
        saved["lr"] = {"tensor": "AAA", "dtype": "float32", "shape": [1]}
    path.write_text(json.dumps(state))
    told = "has no 'watch'" if damage == "an entry" else "must hold tensors as geomwatch has saved"
    with pytest.raises(geomwatch.UsageError, match=told):
        train(tmp_path, GeomwatchCallback(**WATCH), resume=True)


def test_other_rules_than_those_saved_are_refused(tmp_path):
    train(tmp_path, GeomwatchCallback(**WATCH))
    with pytest.raises(geomwatch.UsageError, match=r"state must be of rules \[\], got"):
        train(tmp_path, GeomwatchCallback(**WATCH, rules=[]), resume=True)


def test_a_second_training_starts_anew(tmp_path):
    callback = GeomwatchCallback(how=geomwatch.Measurement(quantities=["loss"]), every=4)
    trainer = make(tmp_path, callback)
    trainer.train()
    first = callback.monitor
    trainer.train()
    assert callback.monitor is not first
    assert [r.step for r in callback.monitor.history] == [r.step for r in first.history] == [0, 4]


class Interrupts(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.times:
            self.times += 1
            raise KeyboardInterrupt


def test_it_starts_anew_after_a_training_that_was_broken_off(tmp_path):
    callback = GeomwatchCallback(how=geomwatch.Measurement(quantities=["loss"]), every=4)
    trainer = make(tmp_path, callback)
    trainer.add_callback(Interrupts())
    original = trainer.training_step
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert [record.step for record in callback.monitor.history] == [0, 4]
    assert trainer.training_step == original  # no shadow is left, not even of the first training
