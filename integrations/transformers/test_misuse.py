"""What can't work is said at once and clearly; what can goes on, with the right numbers."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from trainers import causal, make, sentences

import geomwatch
from geomwatch import UsageError
from geomwatch.integrations.transformers import GeomwatchCallback


def loss_only(**options: Any) -> GeomwatchCallback:
    settings = {"every": 2, "schedule": "fixed", "quantities": ["loss"]}
    return GeomwatchCallback(**{**settings, **options})


# Where it is put


def test_a_second_callback_is_refused(tmp_path):
    with pytest.raises(UsageError, match="Trainer must have one GeomwatchCallback, got 2"):
        make(tmp_path, [loss_only(), loss_only()])


def test_the_same_callback_twice_is_refused_when_training_begins(tmp_path):
    callback = loss_only()
    trainer = make(tmp_path, callback)
    trainer.add_callback(callback)
    with pytest.raises(UsageError, match="Trainer must have one GeomwatchCallback, got 2"):
        trainer.train()


def test_a_second_trainer_is_refused(tmp_path):
    callback = loss_only()
    first = make(tmp_path, callback)
    with pytest.raises(UsageError, match="must belong to one Trainer, got a second one"):
        make(tmp_path, callback)
    first.train()
    assert [record.step for record in callback.monitor.history] == [0, 2, 4, 6]


def test_a_trainer_that_is_gone_leaves_it_to_another(tmp_path):
    import gc

    callback = loss_only()
    make(tmp_path, callback)
    gc.collect()
    make(tmp_path, callback).train()
    assert len(callback.monitor.history) == 4


class AddsLate(transformers.TrainerCallback):
    def __init__(self, callback: GeomwatchCallback) -> None:
        self.callback = callback

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and self.callback is not None:
            self.trainer.add_callback(self.callback)
            self.callback = None


def test_one_that_is_added_after_training_has_begun_joins_with_the_next_whole_window(
    tmp_path, caplog
):
    callback = loss_only(every=1)
    adds = AddsLate(callback)
    trainer = make(tmp_path, adds, gradient_accumulation_steps=2, save_strategy="epoch")
    adds.trainer = trainer
    trainer.train()
    assert "added after training had begun: it watches from step 4 on" in caplog.text
    assert [record.step for record in callback.monitor.history] == [4, 5, 6, 7]
    assert {record.how["items"] for record in callback.monitor.history} == {8}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [r.loss for r in callback.monitor.history] == pytest.approx(losses[4:], rel=1e-6)


def test_attach_names_the_trainer_and_adds_the_callback(tmp_path):
    callback = loss_only()
    trainer = make(tmp_path)
    callback.attach(trainer)
    callback.attach(trainer)
    trainer.train()
    assert len(callback.monitor.history) == 4
    with pytest.raises(UsageError, match=r"must be a transformers.Trainer, got GPT2LMHeadModel"):
        callback.attach(trainer.model)


def test_events_without_a_trainer_are_refused():
    callback = loss_only()
    state = transformers.TrainerState(stateful_callbacks=[callback])
    with pytest.raises(UsageError, match=r"found none that calls it. Call callback.attach"):
        callback.on_train_begin(None, state, None, optimizer=None)


@pytest.mark.parametrize("train_dataset", [None, "same"])
def test_a_trainer_that_only_evaluates_is_told_that_nothing_is_measured(
    tmp_path, caplog, train_dataset
):
    caplog.set_level(logging.INFO, "geomwatch")
    callback = loss_only()
    trainer = make(tmp_path, callback, parts={"eval_dataset": sentences(8)})
    trainer.train_dataset = None if train_dataset is None else trainer.train_dataset
    trainer.evaluate()
    trainer.predict(sentences(8))
    (told,) = [r for r in caplog.records if "in an evaluation alone" in r.getMessage()]
    # one that may train later is not to be alarmed
    assert told.levelno == (logging.WARNING if train_dataset is None else logging.INFO)
    assert callback.monitor is None


def test_a_run_shorter_than_every_is_told_of_when_it_begins(tmp_path, caplog):
    trainer = make(tmp_path, loss_only(every=100))
    trainer.train()
    assert caplog.messages[0].startswith(
        "every=100 makes one probe only, at the first of the 8 steps of this run. Pass every=1"
    )


def test_several_processes_are_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, loss_only())
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(UsageError, match="must run in one process on one device, got 2 processes"):
        trainer.train()


# What it is given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evry": 3}, r"GeomwatchCallback must be given options of Monitor, got evry. It knows"),
        ({"every": 0}, r"every must be an integer >= 1, got 0"),
        ({"schedule": "daily"}, r"schedule must be .* got 'daily'"),
        ({"quantities": ["sharpness"]}, r"list of known names, got 'sharpness'"),
        ({"on_critical": "halt"}, r'on_critical must be "save", "stop" or None, got \'halt\''),
        ({"prefix": None}, r"prefix must be a string, got NoneType"),
        ({"loss_fn": 3}, r"loss_fn must be callable as loss_fn\(model, batch\), got int"),
    ],
)
def test_an_option_that_can_not_work_is_refused_where_it_is_written(options, message):
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=message):
        GeomwatchCallback(**options)
    assert torch.equal(torch.get_rng_state(), before)


def test_params_that_fit_nothing_are_refused_when_training_begins(tmp_path):
    with pytest.raises(UsageError, match="params must match at least one trainable parameter"):
        make(tmp_path, loss_only(params="head.*")).train()


# Losses that it can't see


class Own(transformers.Trainer):
    """Calls backward() itself; what it trains on is up to `also`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, dict(inputs))
        loss.backward()
        return self.also(model, inputs, loss.detach())

    def also(self, model, inputs, loss):
        return loss


class Penalised(Own):
    def also(self, model, inputs, loss):
        (0.05 * model.transformer.wte.weight.square().sum()).backward()
        return loss


class Reporting(Own):
    def also(self, model, inputs, loss):
        return 2 * loss


class Adversarial(Own):
    def also(self, model, inputs, loss):
        adverse = self.compute_loss(model, dict(inputs))
        adverse.backward()
        return loss + adverse.detach()


class Direct(transformers.Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


class Added(transformers.Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss = loss + 0.05 * model.transformer.wte.weight.square().sum()
        self.accelerator.backward(loss)
        return loss.detach()


NOISE = torch.Generator().manual_seed(3)


class PrivateNoise(transformers.Trainer):
    """Draws from a generator that no probe can know of."""

    def compute_loss(self, model, inputs, **kwargs):
        return super().compute_loss(model, inputs, **kwargs) * (1 + torch.rand((), generator=NOISE))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Penalised, r"got gradients that lie \d+% apart, .*: it trains on something else as well"),
        (Reporting, r"got 9\.\d+ in training and 4\.\d+ from compute_loss"),
        (Adversarial, "must get its loss from one call of compute_loss, got 2 calls"),
        (Direct, "must get its loss from one call of compute_loss, got 0 calls"),
        (Added, r"got [\d.]+ in training and [\d.]+ from compute_loss"),
        (PrivateNoise, r"got [\d.]+ in training and [\d.]+ from compute_loss"),
    ],
)
def test_a_loss_that_can_not_be_computed_again_is_refused_at_the_first_step(
    tmp_path, kind, message
):
    torch.manual_seed(1)
    trainer = make(tmp_path, loss_only(), model=causal(0.1), kind=kind)
    with pytest.raises(UsageError, match=message) as raised:
        trainer.train()
    assert str(raised.value).startswith(f"{kind.__name__}.training_step must")
    assert "Pass GeomwatchCallback(loss_fn=...)" in str(raised.value)
    assert trainer.state.global_step == 0


def test_a_loss_fn_measures_what_compute_loss_does_not_return(tmp_path, caplog):
    def loss_fn(model, inputs):
        return model(**inputs).loss

    callback = loss_only(loss_fn=loss_fn)
    trainer = make(tmp_path, callback, model=causal(0.1), kind=Direct)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [r.loss for r in callback.monitor.history] == pytest.approx(losses[::2], rel=1e-6)
    assert "loss_fn gives" not in caplog.text


def test_a_loss_fn_that_is_not_the_loss_trained_on_is_told_of(tmp_path, caplog):
    callback = loss_only(loss_fn=lambda model, inputs: 2 * model(**inputs).loss)
    make(tmp_path, callback, kind=Direct).train()
    assert "loss_fn gives 9." in caplog.text
    assert "where the Trainer trains on 4." in caplog.text
    assert len(callback.monitor.history) == 4


class Later(transformers.Trainer):
    """From the fourth step on it does not call compute_loss any more."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step < 3:
            return super().training_step(model, inputs, num_items_in_batch)
        return Direct.training_step(self, model, inputs, num_items_in_batch)


def test_one_that_goes_out_of_sight_later_is_told_of_and_training_goes_on(tmp_path, caplog):
    callback = loss_only(every=1)
    trainer = make(tmp_path, callback, kind=Later)
    trainer.train()
    assert trainer.state.global_step == 8
    assert [record.step for record in callback.monitor.history] == [0, 1, 2]
    told = [m for m in caplog.messages if "must get its loss from one call" in m]
    assert len(told) == 1
    assert "This step is not measured" in told[0]


# Alerts


class Alarm(geomwatch.rules.NonFinite):
    """Critical at step 2."""

    name = "alarm"

    def __call__(self, seen):
        if seen.step != 2:
            return None
        return geomwatch.Alert(self.name, "critical", "as asked", 2.0, 1.0, seen.step)


def test_a_critical_alert_can_save_a_checkpoint(tmp_path):
    trainer = make(tmp_path, loss_only(on_critical="save", rules=[Alarm()]))
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert trainer.state.global_step == 8


def test_a_critical_alert_can_stop_the_training(tmp_path, caplog):
    heard = []
    options = {"on_critical": "stop", "rules": [Alarm()], "on_alert": heard.append}
    trainer = make(tmp_path, loss_only(**options))
    trainer.train()
    assert trainer.state.global_step == 3
    assert not list(tmp_path.glob("checkpoint-*"))
    assert [alert.step for alert in heard] == [2]
    assert "step 3: training stops, as on_critical asks" in caplog.text


def test_alerts_change_nothing_unless_asked(tmp_path):
    trainer = make(tmp_path, loss_only(rules=[Alarm()]))
    trainer.train()
    assert trainer.state.global_step == 8
    assert not list(tmp_path.glob("checkpoint-*"))


class Breaks(transformers.Trainer):
    def compute_loss(self, model, inputs, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 else loss


def test_weights_that_are_lost_are_not_saved(tmp_path, caplog):
    trainer = make(tmp_path, loss_only(on_critical="save"), kind=Breaks)
    trainer.train()
    assert "the loss is nan" in caplog.text  # which the Trainer's own log hides
    assert "no checkpoint is saved, although on_critical asks for it" in caplog.text
    assert not list(tmp_path.glob("checkpoint-*"))
