"""Training steps of the user's own: measured right, or refused, never another number."""

from __future__ import annotations

import pytest
import torch
import transformers
from trainers import causal, loss_only, make

from geomwatch import UsageError


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
