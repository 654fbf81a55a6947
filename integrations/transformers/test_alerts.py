"""What a critical alert may do to a training, if it is asked to."""

from __future__ import annotations

import transformers
from trainers import loss_only, make

import geomwatch


class Alarm(geomwatch.rules.NonFinite):
    """Critical at step 2."""

    name = "alarm"

    def __call__(self, seen):
        if seen.index != 2:
            return None
        return geomwatch.Alert(self.name, "critical", "as asked", 2.0, 1.0, seen.index)


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
    assert "the loss of the batch of step 2 is nan" in caplog.text  # the Trainer hides it
    assert "no checkpoint is saved, although on_critical asks for it" in caplog.text
    assert not list(tmp_path.glob("checkpoint-*"))
