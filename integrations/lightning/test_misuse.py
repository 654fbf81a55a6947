"""Wrong use, and modules a probe can't follow: a clear message each, never another number."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomwatch import UsageError
from geomwatch.integrations.lightning import GeomwatchCallback

ONE = {"every": 1, "schedule": "fixed"}


def told(caplog: Any, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


# Options


def test_an_unknown_option_is_refused_at_once():
    with pytest.raises(TypeError, match="must be given options of Monitor, got evry"):
        GeomwatchCallback(evry=10)


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


def test_a_missing_lightning_is_named_with_what_to_install(monkeypatch):
    for name in ("lightning", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "geomwatch.integrations._lightning_names")
    words = r"needs lightning or pytorch-lightning.*pip install 'geomwatch\[lightning\]'"
    with pytest.raises(ImportError, match=words):
        importlib.import_module("geomwatch.integrations._lightning_names")


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
    callback = GeomwatchCallback(every=2, schedule="fixed")

    class Late(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 2:
                self.trainer.callbacks.append(callback)

    fit(Late(), accumulate_grad_batches=accumulate)
    assert told(caplog, "it watches from step") == 1
    assert [r.step for r in callback.monitor.history] == ([4, 6] if accumulate == 1 else [2])


def test_every_larger_than_the_run_is_told_of(Net, fit, caplog):
    fit(Net(), [GeomwatchCallback(every=100)])
    assert told(caplog, "every=100 is more than the 8 steps of this run") == 1
    caplog.clear()
    fit(Net(), [GeomwatchCallback(every=4)])
    assert told(caplog, "steps of this run") == 0


# Modules


class ByHand(nn.Module):
    """Manual optimisation; the tests mix in the host's LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.through_lightning)
        loss = F.cross_entropy(self.layers(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    through_lightning = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def Manual(host) -> type[Any]:  # noqa: N802  # it is a class
    return type("Manual", (ByHand, host.LightningModule), {})


def loss_of(module: Any, batch: Any) -> Any:
    return F.cross_entropy(module.layers(batch[0]), batch[1])


def test_manual_optimisation_without_a_loss_is_refused_before_the_first_step(Manual, fit):
    module = Manual()
    with pytest.raises(UsageError, match="loss_fn must be given for a module with manual optimis"):
        fit(module, [GeomwatchCallback()])
    assert module.trainer.global_step == 0


def test_losses_must_fit_the_optimizers(Manual, fit):
    class Two(Manual):
        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    for given, words in (
        (None, "for each of 2 optimizers, got none"),
        (loss_of, "for each of 2 optimizers, got one for all"),
        ({"a": loss_of}, r"got 1 \(a\) for 2"),
    ):
        with pytest.raises(UsageError, match=words):
            fit(Two(), [GeomwatchCallback(loss_fn=given)])


def test_a_module_that_steps_the_torch_optimizer_itself_is_refused(Manual, fit):
    module = Manual()
    module.through_lightning = False
    with pytest.raises(UsageError, match=r"got 1 steps of SGD that it did not know of"):
        fit(module, [GeomwatchCallback(loss_fn=loss_of)])


def test_a_training_step_that_steps_an_optimizer_or_scheduler_is_refused(Net, fit):
    class Stepping(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.trainer.optimizers[0].step()
            return loss

    class Scheduling(Net):
        def training_step(self, batch, batch_idx):
            self.lr_schedulers().step()
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1000)]

    words = "evaluated again without stepping, got a call of step"
    with pytest.raises(UsageError, match=words):
        fit(Stepping(), [GeomwatchCallback()])
    with pytest.raises(UsageError, match=words):
        fit(Scheduling(), [GeomwatchCallback()])


def test_a_loss_fn_that_calls_manual_backward_is_refused(Manual, fit):
    def with_backward(module: Any, batch: Any) -> Any:
        loss = loss_of(module, batch)
        module.manual_backward(loss)
        return loss

    with pytest.raises(UsageError, match=r"without a backward pass, got a call of manual_backward"):
        fit(Manual(), [GeomwatchCallback(loss_fn=with_backward)])


def test_a_loss_that_comes_out_otherwise_the_second_time_is_refused(Net, fit):
    class Counting(Net):
        calls = 0

        def training_step(self, batch, batch_idx):
            self.calls += 1
            return self.calls * super().training_step(batch, batch_idx)

    class OwnChance(Net):
        rng = torch.Generator().manual_seed(0)

        def training_step(self, batch, batch_idx):
            noise = torch.rand(1, generator=self.rng)
            return (1 + noise.item()) * super().training_step(batch, batch_idx)

    for kind in (Counting, OwnChance):
        with pytest.raises(UsageError, match=r"must give the same loss .* is trained on"):
            fit(kind(), [GeomwatchCallback()])


def test_a_loss_that_is_none_the_second_time_is_refused(Net, fit):
    class Once(Net):
        last = None

        def training_step(self, batch, batch_idx):
            if self.last is batch_idx:
                return None
            self.last = batch_idx
            return super().training_step(batch, batch_idx)

    with pytest.raises(UsageError, match=r"training_step must return its loss.*got NoneType"):
        fit(Once(), [GeomwatchCallback()])


def test_a_gradient_that_is_not_that_of_the_loss_is_told_of(Net, fit, caplog):
    class Pulled(Net):
        def backward(self, loss):
            super().backward(loss)
            for p in self.parameters():
                p.grad.add_(p.detach(), alpha=0.1)

    callback = GeomwatchCallback(**ONE)
    fit(Pulled(), [callback])
    assert told(caplog, "the gradient that is stepped with lies") == 1
    assert len(callback.monitor.history) == 8


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter` step flavor.*")
def test_a_training_step_that_fetches_its_own_batches_is_refused(Net, fit):
    class Fetching(Net):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(UsageError, match="takes it from dataloader_iter itself"):
        fit(Fetching(), [GeomwatchCallback()])


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer.*")
def test_a_module_without_an_optimizer_is_told_of(Net, fit, caplog):
    class Idle(Net):
        def configure_optimizers(self):
            return None

    callback = GeomwatchCallback(**ONE)
    fit(Idle(), [callback])
    assert told(caplog, "gives _MockOptimizer no parameter of the module") == 1
    assert callback.monitor.history == []


def test_several_processes_are_refused(Net, make_trainer, load, monkeypatch):
    callback = GeomwatchCallback()
    trainer = make_trainer(callbacks=[callback])
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(UsageError, match="must run in one process, got 2"):
        callback.on_fit_start(trainer, Net())
