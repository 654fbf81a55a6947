"""Wrong use, and modules a probe can't follow: a clear message each, never another number."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from geomwatch import Measurement, UsageError
from geomwatch.controllers import LearningRateCap
from geomwatch.integrations.lightning import GeomwatchCallback

ONE = {"every": 1}


def told(caplog: Any, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


# Options


def test_an_unknown_option_is_refused_at_once():
    with pytest.raises(UsageError, match=r"has no argument 'evry'. Did you mean 'every'"):
        GeomwatchCallback(evry=10)
    with pytest.raises(UsageError, match=r"Write:\n    GeomwatchCallback\(budget=0.05\)"):
        GeomwatchCallback(max_overhead=0.05)


def test_options_that_can_not_work_are_refused_at_once():
    with pytest.raises(UsageError, match="every must be an integer >= 1, got 0"):
        GeomwatchCallback(every=0)
    with pytest.raises(
        UsageError, match='on_critical must be "save", "stop" or None, got \'halt\''
    ):
        GeomwatchCallback(on_critical="halt")
    with pytest.raises(TypeError, match="prefix must be a string, got int"):
        GeomwatchCallback(prefix=3)
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        GeomwatchCallback(loss_fn={"generator": 1})


def test_one_item_does_for_a_list(Net, fit, tmp_path):
    teacher = nn.Dropout()
    cap = LearningRateCap(dry_run=True)
    how = Measurement(also=teacher, quantities="loss")
    sink = str(tmp_path / "run.jsonl")
    fit(Net(), [GeomwatchCallback(how, every=4, controllers=cap, sinks=sink)])
    assert (tmp_path / "run.jsonl").read_text().count('"kind": "record"') >= 2


# Where the callback is


def test_two_callbacks_in_a_trainer_are_refused(Net, make_trainer, load):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `GeomwatchC"):
        make_trainer(callbacks=[GeomwatchCallback(), GeomwatchCallback(every=3)])
    callback = GeomwatchCallback()
    trainer = make_trainer(callbacks=[callback])
    trainer.callbacks.append(callback)
    with pytest.raises(UsageError, match="Trainer must have one GeomwatchCallback, got 2"):
        trainer.fit(Net(), load(), load(64, shuffle=False))


def test_a_second_trainer_is_refused(Net, fit):
    callback = GeomwatchCallback()
    fit(Net(), [callback])
    with pytest.raises(UsageError, match="must belong to one Trainer, got a second one"):
        fit(Net(), [callback])


def test_a_trainer_that_only_evaluates_is_told_of_once(Net, make_trainer, load, caplog):
    trainer = make_trainer(callbacks=[GeomwatchCallback()])
    for _ in range(2):
        trainer.validate(Net(), load(64, shuffle=False), verbose=False)
    assert told(caplog, "in trainer.validate() there is nothing to see") == 1


def test_evaluating_after_training_is_nothing_to_speak_of(Net, make_trainer, load, caplog):
    trainer, module = make_trainer(callbacks=[GeomwatchCallback()]), Net()
    trainer.fit(module, load(), load(64, shuffle=False))
    trainer.validate(module, load(64, shuffle=False), verbose=False)
    assert told(caplog, "there is nothing to see") == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_callback_added_after_training_began_joins_in_and_says_so(Net, fit, caplog, accumulate):
    callback = GeomwatchCallback(every=2)

    class Late(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                self.trainer.callbacks.append(callback)

    fit(Late(), accumulate_grad_batches=accumulate)
    assert told(caplog, "it watches from step") == 1
    assert [r.step for r in callback.monitor.history] == ([3, 4, 6] if accumulate == 1 else [2])


def test_every_larger_than_the_run_is_told_of(Net, fit, caplog):
    fit(Net(), [GeomwatchCallback(every=100)])
    assert (
        told(caplog, "every=100 makes one probe only, at the first of the 8 steps of this run") == 1
    )
    caplog.clear()
    fit(Net(), [GeomwatchCallback(every=4)])
    assert told(caplog, "steps of this run") == 0


def test_processes_that_do_not_average_their_gradients_are_refused(
    Net, make_trainer, load, monkeypatch
):
    callback = GeomwatchCallback()
    trainer = make_trainer(callbacks=[callback])
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(UsageError, match="averaged over all processes, got SingleDeviceStrategy"):
        callback.on_fit_start(trainer, Net())


def test_the_class_instead_of_a_callback_is_refused_with_the_line_to_write(make_trainer):
    with pytest.raises(UsageError) as refused:
        make_trainer(callbacks=[GeomwatchCallback])
    assert str(refused.value).endswith("\n    Trainer(callbacks=[GeomwatchCallback()])")


def test_the_callback_of_the_other_host_is_refused_with_the_line_to_write(Net, make_trainer, load):
    transformers = pytest.importorskip("geomwatch.integrations.transformers")
    trainer = make_trainer(callbacks=[transformers.GeomwatchCallback()], limit_val_batches=0)
    with pytest.raises(UsageError) as refused:
        trainer.fit(Net(), load(), load())
    line = "from geomwatch.integrations.lightning import GeomwatchCallback"
    assert str(refused.value).splitlines()[-1].strip() == line
    with pytest.raises(UsageError, match=r"integrations\.transformers import GeomwatchCallback"):
        GeomwatchCallback().on_init_end(None, None, None)
