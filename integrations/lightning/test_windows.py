"""The window of a step: every batch that its gradient is made of, as training_step got it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import geomwatch
from geomwatch import Measurement
from geomwatch.integrations.lightning import GeomwatchCallback

LOSS_ONLY = {"how": Measurement(quantities=["loss", "grad_norm"]), "every": 1}
cross_entropy = geomwatch.supervised(F.cross_entropy)


def test_pieces_of_micro_batches_give_the_same_loss(Noted, fit, load):
    losses = []
    for pieces in (None, 5):
        how = Measurement(quantities=["loss", "grad_norm"], micro_batch=pieces)
        callback = GeomwatchCallback(how, every=1)
        torch.manual_seed(2)
        fit(Noted(), [callback], loader=load(250, 32), accumulate_grad_batches=2)
        losses.append([record.loss for record in callback.monitor.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("writes", ["a popped key", "in place", "in place, later"])
def test_a_training_step_that_changes_its_batch_is_measured_on_what_it_got(
    Noted, fit, load, caplog, writes
):
    class Writing(Noted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            original = (inputs.clone(), targets.clone())
            if writes == "a popped key":
                batch.pop()
            elif writes == "in place" or batch_idx > 3:
                inputs.sub_(0.1)
            loss = self.loss((inputs, targets))
            self.log("accuracy", self.accuracy)
            self.window.append(original)
            self.window_losses.append(loss.detach())
            return loss

    module = Writing()
    callback = GeomwatchCallback(**LOSS_ONLY)
    fit(module, [callback])
    found = {record.step: record.loss for record in callback.monitor.history}
    trained = {step: loss for step, (*_, loss) in enumerate(module.steps)}
    told = [r for r in caplog.records if "has changed its batch in place" in r.msg]
    if writes == "in place, later":
        del trained[4]  # nobody could know
    assert len(told) == (writes == "in place, later")
    assert found == pytest.approx(trained, rel=1e-6)


def test_a_window_accumulated_by_hand_is_measured_as_a_whole(host, fit, load):
    class ByHand(host.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layers = nn.Linear(64, 10)
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            loss = cross_entropy(self.layers, batch)
            self.losses.append(loss.item())
            if batch_idx % 4 == 0:
                optimizer.zero_grad()
            self.manual_backward(loss / 4)
            if batch_idx % 4 == 3:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = ByHand()
    callback = GeomwatchCallback(
        **LOSS_ONLY, loss_fn=lambda module, batch: cross_entropy(module.layers, batch)
    )
    fit(module, [callback])
    assert [record.provenance["items"] for record in callback.monitor.history] == [128, 128]
    trained = [sum(module.losses[:4]) / 4, sum(module.losses[4:]) / 4]
    assert [record.loss for record in callback.monitor.history] == pytest.approx(trained, rel=1e-6)


def test_weights_that_are_unfrozen_on_the_way_are_measured_too(Noted, fit):
    class Thawing(Noted):
        def __init__(self) -> None:
            super().__init__()
            self.layers[0].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.layers[0].requires_grad_(True)
                group = {"params": list(self.layers[0].parameters())}
                self.trainer.optimizers[0].add_param_group(group)

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    lines: list[dict[str, Any]] = []
    callback = GeomwatchCallback(every=4, sinks=[lines.append])
    fit(Thawing(), [callback], max_epochs=2)
    assert [x["parameters"] for x in lines if x["kind"] == "run"] == [75]
    assert sum(p.numel() for p in callback.monitor.params) == 75 + 64 * 24 + 24
    assert [record.step for record in callback.monitor.history] == [0, 4, 8, 12]
