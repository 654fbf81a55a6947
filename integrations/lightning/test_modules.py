"""Modules that a probe can't follow: a clear message each, never another number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomwatch import UsageError
from geomwatch.integrations.lightning import GeomwatchCallback

ONE = {"every": 1}


def told(caplog: Any, words: str) -> int:
    return sum(words in record.getMessage() for record in caplog.records)


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
