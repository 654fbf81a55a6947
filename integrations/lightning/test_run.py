"""What a Trainer does with the callback: checkpoints, resuming, metrics to monitor, stopping."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch

import geomwatch
from geomwatch.integrations.lightning import GeomwatchCallback

FIXED = {"every": 3}
BOTH = pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)


class Alarm(geomwatch.rules.NonFinite):
    """Raises a critical alert at one step."""

    def __init__(self, at: int, name: str = "alarm") -> None:
        super().__init__()
        self._at, self._rule = at, name

    def __call__(self, seen: Any) -> Any:
        if seen.index == self._at and seen.fresh:
            return geomwatch.Alert(self._rule, "critical", "alarm", 1.0, 0.5, seen.index)
        return None


@BOTH
@pytest.mark.parametrize(("every", "steps", "records"), [(3, 8, 3), (4, 8, 2)])
def test_every_gives_one_record_each_so_many_optimizer_steps(Net, fit, every, steps, records):
    callback = GeomwatchCallback(every=every)
    fit(Net(), [callback], max_epochs=-1, max_steps=steps, accumulate_grad_batches=2)
    assert [r.step for r in callback.monitor.history] == [i * every for i in range(records)]
    assert records == math.ceil(steps / every)


@BOTH
def test_a_single_callback_need_not_be_in_a_list(Net, make_trainer, load):
    callback = GeomwatchCallback(**FIXED)
    make_trainer(callbacks=callback).fit(Net(), load(), load(64, shuffle=False))
    assert len(callback.monitor.history) == 3


def test_checkpoints_and_early_stopping_can_monitor_the_margin(Net, fit, host, tmp_path):
    best = host.callbacks.ModelCheckpoint(
        tmp_path, monitor="geom/stability_margin", mode="min", every_n_train_steps=3, save_top_k=1
    )
    never = host.callbacks.EarlyStopping("geom/stability_margin", divergence_threshold=1e-9)
    callback = GeomwatchCallback(**FIXED)
    trainer = fit(Net(), [callback, never, best], max_epochs=3, enable_checkpointing=True)
    margins = [record["stability_margin"].value for record in callback.monitor.history]
    assert float(best.best_model_score) == pytest.approx(min(margins[1:]), rel=1e-6)
    assert trainer.global_step == 8  # the first epoch ended the run
    shown = {name for name in trainer.progress_bar_metrics if name.startswith("geom/")}
    assert shown == {"geom/stability_margin"}
    assert float(trainer.callback_metrics["geom/stability_margin"]) == pytest.approx(margins[-1])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@BOTH
def test_a_run_that_resumes_goes_on_counting_with_a_cold_first_probe(
    Net, fit, host, load, tmp_path
):
    def checkpoints() -> Any:
        return host.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)

    def run(callback: Any, **options: Any) -> Any:
        torch.manual_seed(3)
        data = load(shuffle=False)
        return fit(
            Net(dropout=0.0, norm=False),
            [callback, checkpoints()],
            loader=data,
            max_epochs=3,
            enable_checkpointing=True,
            **options,
        )

    whole = GeomwatchCallback(**FIXED)
    run(whole)
    first = min(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    saved = torch.load(first, weights_only=True)["callbacks"]
    assert saved["GeomwatchCallback"]["monitors"][""]["step"] == 8
    resumed = GeomwatchCallback(**FIXED)
    run(resumed, ckpt_path=first)
    later = [record for record in whole.monitor.history if record.step > 8]
    assert [record.step for record in resumed.monitor.history] == [9, 12, 15, 18, 21]
    for old, new in zip(later, resumed.monitor.history, strict=True):
        assert new.loss == pytest.approx(old.loss, rel=1e-6)
        for name in ("stability_margin", "lambda_max"):
            a, b = old[name], new[name]
            if a.status == b.status == "ok":
                assert abs(a.value - b.value) <= 3 * (a.error + b.error)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_a_run_without_geomwatch_is_resumed_at_its_step(Net, fit, host, tmp_path):
    keeper = host.callbacks.ModelCheckpoint(tmp_path)
    fit(Net(), [keeper], enable_checkpointing=True)
    callback = GeomwatchCallback(**FIXED)
    fit(Net(), [callback], max_epochs=2, ckpt_path=keeper.best_model_path)
    assert [record.step for record in callback.monitor.history] == [8, 9, 12, 15]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_checkpoint_of_a_run_with_geomwatch_is_resumed_without(Net, fit, host, tmp_path):
    keeper = host.callbacks.ModelCheckpoint(tmp_path)
    fit(Net(), [keeper, GeomwatchCallback()], enable_checkpointing=True)
    trainer = fit(Net(), max_epochs=2, ckpt_path=keeper.best_model_path)
    assert trainer.global_step == 16


def test_a_checkpoint_of_other_rules_is_refused_before_training(Net, fit):
    first = GeomwatchCallback(**FIXED)
    fit(Net(), [first])
    callback = GeomwatchCallback(**FIXED, rules=[])
    callback.load_state_dict(first.state_dict())
    with pytest.raises(
        geomwatch.UsageError, match=r"state must be of rules \[\], got \['non_finite"
    ):
        fit(Net(), [callback])


def test_a_checkpoint_of_another_version_costs_no_run(Net, fit, caplog):
    callback = GeomwatchCallback(**FIXED)
    callback.load_state_dict({"monitors": {"": {"rules": [], "nothing": 0}}})
    fit(Net(), [callback])
    assert "is from another version of it, so that its rules and controllers start" in caplog.text
    assert [record.step for record in callback.monitor.history] == [0, 3, 6]


def test_a_second_fit_of_the_same_trainer_goes_on(Net, make_trainer, load):
    callback, module = GeomwatchCallback(**FIXED), Net()
    trainer = make_trainer(callbacks=[callback])
    data = load(), load(64, shuffle=False)
    trainer.fit(module, *data)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, *data)
    assert [record.step for record in callback.monitor.history] == [9, 12, 15]


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch.*")
@pytest.mark.parametrize("on_critical", ["save", "stop", None])
def test_a_critical_alert_saves_or_stops_as_asked(Net, fit, tmp_path, caplog, on_critical):
    callback = GeomwatchCallback(**FIXED, rules=[Alarm(3)], on_critical=on_critical)
    trainer = fit(Net(), [callback])
    assert trainer.global_step == (4 if on_critical == "stop" else 8)
    saved = list(tmp_path.rglob("*.ckpt"))
    assert [path.name for path in saved] == ["geomwatch-step=4.ckpt"] * (on_critical == "save")
    if on_critical is not None:
        assert "as on_critical asks" in caplog.text
    if saved:
        checkpoint = torch.load(saved[0], weights_only=True)
        assert checkpoint["global_step"] == 4
        assert checkpoint["callbacks"]["GeomwatchCallback"]["monitors"][""]["step"] == 4
        again = GeomwatchCallback(**FIXED, rules=[Alarm(0)])
        assert fit(Net(), [again], max_epochs=2, ckpt_path=saved[0]).global_step > 8


def test_a_checkpoint_that_is_worth_nothing_is_not_saved(Net, fit, tmp_path, caplog):
    callback = GeomwatchCallback(**FIXED, rules=[Alarm(3, "non_finite")], on_critical="save")
    fit(Net(), [callback])
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "no checkpoint is saved, although on_critical asks for it" in caplog.text


def test_a_run_that_blows_up_is_warned_of(Net, fit, caplog):
    callback = GeomwatchCallback(every=2, on_critical="stop")
    trainer = fit(Net(norm=False, dropout=0.0, lr=30.0), [callback], max_epochs=4)
    assert trainer.global_step < 16
    assert callback.monitor.alerts[-1].severity == "critical"
    first, *rest = callback.monitor.alerts[-1].message.splitlines()
    assert first in caplog.text
    assert all(line in caplog.text for line in rest)


def test_a_probe_that_fails_costs_no_training(Net, fit, caplog):
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if geomwatch.is_probing() and self.global_step > 2:
                raise RuntimeError("no second time")
            return super().training_step(batch, batch_idx)

    module = Failing()
    callback = GeomwatchCallback(every=1)
    assert fit(module, [callback]).global_step == 8
    assert [record.step for record in callback.monitor.history] == [0, 1, 2]
    assert "a probe failed with RuntimeError: no second time" in caplog.text
    assert len(module.losses) == 8


def test_a_fit_that_is_interrupted_leaves_the_module_as_it_was(Net, fit):
    class Broken(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("disk full")

    module, callback = Broken(), GeomwatchCallback(every=1)
    with pytest.raises(RuntimeError, match="disk full"):
        fit(module, [callback])
    assert not {"training_step", "configure_gradient_clipping"} & set(vars(module))
    assert len(callback.monitor.history) == 3


@BOTH
def test_records_alerts_and_the_run_are_in_the_log_and_the_sinks(Net, fit, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="geomwatch")
    sink = geomwatch.JsonLines(tmp_path / "run.jsonl")
    fit(Net(), [GeomwatchCallback(**FIXED, sinks=[sink])])
    assert (tmp_path / "run.jsonl").read_text().count('"kind": "record"') == 3
    assert len([r for r in caplog.records if r.getMessage().startswith("step ")]) == 3
