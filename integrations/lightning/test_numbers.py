"""What is measured is the loss trained on, and its curvature that of `geomwatch.measure`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import digits
from torch import Tensor, nn

import geomwatch
from geomwatch.integrations.lightning import GeomwatchCallback
from geomwatch.rules import NonFinite

LOSS_ONLY = {"every": 1, "schedule": "fixed", "quantities": ["loss", "grad_norm"]}
cross_entropy = geomwatch.supervised(F.cross_entropy)


class Listening(NonFinite):
    """A rule that notes what is known of each step once it is over."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.norms: list[float] = []

    def __call__(self, seen: Any) -> None:
        if seen.settled is not None:
            self.losses.append(seen.settled.loss)
            self.norms.append(seen.settled.grad_norm)


@pytest.fixture
def Noted(Net) -> type[Any]:  # noqa: N802  # it is a class
    """Tells three kinds of digits apart; keeps the net, its gradients and batches at each step."""

    class Noted(Net):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{"dropout": 0.0, "norm": False, "kinds": 3} | options)
            self.window: list[Any] = []
            self.window_losses: list[Tensor] = []
            self.steps: list[tuple[nn.Module, list[Any], float]] = []
            self.norms: list[float] = []  # before clipping

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.window.append(batch)
            self.window_losses.append(loss.detach())
            return loss

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.norms.append(nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            net = copy.deepcopy(self.layers)
            for mine, its in zip(self.layers.parameters(), net.parameters(), strict=True):
                its.grad = mine.grad.clone()
            loss = torch.stack(self.window_losses).mean().item()
            self.steps.append((net, self.window, loss))
            self.window, self.window_losses = [], []

    return Noted


def mean_of_means(net: nn.Module, window: list[Any]) -> Tensor:
    """The loss of a window as Lightning trains on it: each micro-batch counts the same."""
    losses = [F.cross_entropy(net(inputs), targets % 3) for inputs, targets in window]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lambda_max_is_that_of_measure_on_the_window(Noted, fit, load, accumulate):
    # few enough directions for Lanczos to be exact in a probe's budget
    watch = {"every": 1, "schedule": "fixed", "quantities": ["lambda_max"], "params": "*4.bias"}
    callback = GeomwatchCallback(**watch)
    module = Noted()
    # the last micro-batch is shorter
    fit(module, [callback], loader=load(250, 32), accumulate_grad_batches=accumulate)
    exact = [
        geomwatch.measure(net, mean_of_means, window, quantities=["lambda_max"], params="4.bias")
        for net, window, _ in module.steps
    ]
    found = [record["lambda_max"].value for record in callback.monitor.history]
    assert len(found) == 8 // accumulate
    assert found == pytest.approx([record["lambda_max"].value for record in exact], rel=1e-5)


def test_lambda_max_of_all_weights_is_right_to_its_error(Noted, fit):
    module = Noted()
    callback = GeomwatchCallback(every=1, schedule="fixed", quantities=["lambda_max"])
    fit(module, [callback], accumulate_grad_batches=2)
    for record, (net, window, _) in zip(callback.monitor.history, module.steps, strict=True):
        exact = geomwatch.measure(net, mean_of_means, window, quantities=["lambda_max"])
        found = record["lambda_max"]
        assert abs(found.value - exact["lambda_max"].value) <= found.error + 1e-4


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_loss_measured_is_the_loss_trained_on(Noted, fit, load, accumulate, dropout):
    # with dropout too: a probe draws the masks of the step again
    rule = Listening()
    callback = GeomwatchCallback(**LOSS_ONLY, rules=[rule])
    module = Noted(dropout=dropout, norm=True)
    fit(module, [callback], loader=load(250, 32), accumulate_grad_batches=accumulate)
    trained = [loss for *_, loss in module.steps]
    assert [record.loss for record in callback.monitor.history] == pytest.approx(trained, rel=1e-6)
    assert rule.losses == pytest.approx(trained, rel=1e-6)  # what the rules see of every step
    norms = [
        nn.utils.get_total_norm([p.grad for p in net.parameters()]) for net, *_ in module.steps
    ]
    found = [record["grad_norm"].value for record in callback.monitor.history]
    expected = [norm.item() for norm in norms]
    if accumulate == 3:  # Lightning divides the two micro-batches of the last window by three
        expected[-1] *= 3 / 2
    assert found == pytest.approx(expected, rel=1e-4)


def test_under_autocast_it_is_that_loss_to_the_rounding_of_bfloat16(Noted, fit):
    module = Noted()
    callback = GeomwatchCallback(**LOSS_ONLY)
    fit(module, [callback], precision="bf16-mixed")
    trained = [loss for *_, loss in module.steps]
    found = [record.loss for record in callback.monitor.history]
    assert found == pytest.approx(trained, rel=1e-2)
    assert found != trained
    again = GeomwatchCallback(**LOSS_ONLY, precision="training")
    module = Noted()
    fit(module, [again], precision="bf16-mixed")
    trained = [loss for *_, loss in module.steps]
    assert [record.loss for record in again.monitor.history] == pytest.approx(trained, rel=1e-6)


def test_rules_see_loss_and_norm_as_they_are_under_a_grad_scaler(Noted, fit, host):
    class Adam(Noted):
        fused = False

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=self.fused)

    seen = []
    for fused in (False, True):
        torch.manual_seed(2)
        rule, module = Listening(), Adam()
        module.fused = fused
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        plugin = host.plugins.MixedPrecision("16-mixed", "cpu", scaler)
        fit(module, [GeomwatchCallback(rules=[rule], **LOSS_ONLY)], plugins=plugin)
        assert rule.losses == pytest.approx([loss for *_, loss in module.steps], rel=1e-3)
        seen.append(rule.norms)
    assert seen[0] == pytest.approx(seen[1], rel=0.05)
    assert max(seen[1]) < 10


def test_the_margin_is_that_of_the_clipped_gradient_and_the_norm_that_before(Noted, fit):
    class Adam(Noted):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    rule, module = Listening(), Adam()
    wanted = {"quantities": ["stability_margin"], "every": 100}
    callback = GeomwatchCallback(rules=[rule], **wanted)
    fit(module, [callback], gradient_clip_val=1e-6)
    net, window, _ = module.steps[0]
    twin = geomwatch.Monitor(
        net, mean_of_means, torch.optim.Adam(net.parameters(), lr=1e-2), **wanted
    )
    margin = callback.monitor.history[0]["stability_margin"].value
    assert margin == pytest.approx(twin.step([window[0]])["stability_margin"].value, rel=1e-3)
    for p in net.parameters():
        p.grad.mul_(module.norms[0] / 1e-6)
    other = geomwatch.Monitor(
        net, mean_of_means, torch.optim.Adam(net.parameters(), lr=1e-2), **wanted
    )
    assert other.step([window[0]])["stability_margin"].value < 0.1 * margin
    assert rule.norms == pytest.approx(module.norms, rel=1e-5)
    assert min(rule.norms) > 0.01


def test_a_probe_batch_is_measured_instead_of_the_steps_own(Noted, fit):
    module = Noted()
    probe_batch = digits(20)
    start = copy.deepcopy(module.layers)
    callback = GeomwatchCallback(**LOSS_ONLY, probe_batch=probe_batch)
    fit(module, [callback], precision="64-true")  # the batch is cast as those of the loader
    record = callback.monitor.history[0]
    assert record.how["items"] == 20
    assert record.loss == pytest.approx(mean_of_means(start, [probe_batch]).item(), rel=1e-5)


def test_pieces_of_micro_batches_give_the_same_loss(Noted, fit, load):
    losses = []
    for options in ({}, {"micro_batch": 5}):
        callback = GeomwatchCallback(**LOSS_ONLY, **options)
        torch.manual_seed(2)
        fit(Noted(), [callback], loader=load(250, 32), accumulate_grad_batches=2)
        losses.append([record.loss for record in callback.monitor.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("way", ["loss_fn", "geometry_loss"])
def test_a_loss_of_the_users_own_is_measured_and_its_difference_told(Noted, fit, caplog, way):
    class Doubled(Noted):
        pass

    def doubled(module: Any, batch: Any) -> Tensor:
        return 2 * module.loss(batch)

    if way == "geometry_loss":
        Doubled.geometry_loss = doubled
    callback = GeomwatchCallback(**LOSS_ONLY, loss_fn=doubled if way == "loss_fn" else None)
    module = Doubled()
    fit(module, [callback])
    trained = [2 * loss for *_, loss in module.steps]
    assert [record.loss for record in callback.monitor.history] == pytest.approx(trained, rel=1e-6)
    told = [r.getMessage() for r in caplog.records if "Curvature is measured of loss_fn" in r.msg]
    assert len(told) == 1


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
    assert [record.how["items"] for record in callback.monitor.history] == [128, 128]
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
    callback = GeomwatchCallback(every=4, schedule="fixed", sinks=[lines.append])
    fit(Thawing(), [callback], max_epochs=2)
    assert [x["parameters"] for x in lines if x["kind"] == "run"] == [75, 75 + 64 * 24 + 24]
    assert [record.step for record in callback.monitor.history] == [0, 4, 8, 12]
