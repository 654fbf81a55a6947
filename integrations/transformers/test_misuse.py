"""What can't work is said at once and clearly; what can goes on, with the right numbers."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from trainers import causal, loss_only, make, sentences

from geomwatch import Measurement, UsageError
from geomwatch.controllers import LearningRateCap
from geomwatch.integrations._host.parallelism import check_parallelism
from geomwatch.integrations.transformers import GeomwatchCallback

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
    assert {record.provenance["items"] for record in callback.monitor.history} == {8}
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


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("NO", {"num_processes": 2}, "averaged over 2 processes, got NO with GPT2LMHeadModel"),
        ("DEEPSPEED", {}, "gradients in p.grad before a step that the loop takes, got DEEPSPEED"),
        (
            "MULTI_CPU",
            {"parallelism_config": SimpleNamespace(tp_size=2, cp_size=1, sp_size=None)},
            "a model and a batch whole on each rank, got tp_size=2",
        ),
    ],
)
def test_processes_that_do_not_share_a_mean_gradient_are_refused(kind, options, message):
    accelerator = SimpleNamespace(distributed_type=kind, **options)
    with pytest.raises(UsageError, match=message):
        check_parallelism(accelerator, causal(), "GeomwatchCallback")


def test_several_devices_in_one_process_are_refused(tmp_path, monkeypatch):
    trainer = make(tmp_path, loss_only())
    monkeypatch.setattr(trainer.args, "_n_gpu", 2)
    with pytest.raises(UsageError, match="must have one device in a process, got 2"):
        trainer.train()


# What it is given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evry": 3}, r"GeomwatchCallback has no argument 'evry'. Did you mean 'every'"),
        ({"every": 0}, r"every must be an integer >= 1, got 0"),
        ({"schedule": "fixed"}, r"Write:\n    GeomwatchCallback\(every=100\)"),
        ({"how": "ggn"}, r"how must be a geomwatch.Measurement, got 'ggn'"),
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


def test_one_item_does_for_a_list(tmp_path):
    teacher = causal()
    how = Measurement(also=teacher, quantities="loss")
    sink = str(tmp_path / "run.jsonl")
    cap = LearningRateCap(dry_run=True)
    make(tmp_path, GeomwatchCallback(how, every=4, controllers=cap, sinks=sink)).train()
    assert (tmp_path / "run.jsonl").read_text().count('"kind": "record"') >= 2


def test_params_that_fit_nothing_are_refused_when_training_begins(tmp_path):
    with pytest.raises(UsageError, match="params must match at least one trainable parameter"):
        make(tmp_path, loss_only(how=Measurement(params="head.*"))).train()
