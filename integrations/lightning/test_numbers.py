"""What is measured is the loss trained on, and its curvature that of `geomwatch.measure`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import geomwatch
from geomwatch import Measurement
from geomwatch.integrations.lightning import GeomwatchCallback
from geomwatch.rules import NonFinite

LOSS_ONLY = {"how": Measurement(quantities=["loss", "grad_norm"]), "every": 1}
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


def mean_of_means(net: nn.Module, window: list[Any]) -> Tensor:
    """The loss of a window as Lightning trains on it: each micro-batch counts the same."""
    losses = [F.cross_entropy(net(inputs), targets % 3) for inputs, targets in window]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lambda_max_is_that_of_measure_on_the_window(Noted, fit, load, accumulate):
    # few enough directions for Lanczos to be exact in a probe's budget
    how = Measurement(quantities=["lambda_max"], params="*4.bias")
    callback = GeomwatchCallback(how, every=1)
    module = Noted()
    # the last micro-batch is shorter
    fit(module, [callback], loader=load(250, 32), accumulate_grad_batches=accumulate)
    exact = [
        geomwatch.measure(
            net,
            mean_of_means,
            window,
            how=Measurement(quantities=["lambda_max"], params="4.bias"),
        )
        for net, window, _ in module.steps
    ]
    found = [record["lambda_max"].value for record in callback.monitor.history]
    assert len(found) == 8 // accumulate
    assert found == pytest.approx([record["lambda_max"].value for record in exact], rel=1e-5)


def test_lambda_max_of_all_weights_is_right_to_its_error(Noted, fit):
    module = Noted()
    callback = GeomwatchCallback(how=Measurement(quantities=["lambda_max"]), every=1)
    fit(module, [callback], accumulate_grad_batches=2)
    for record, (net, window, _) in zip(callback.monitor.history, module.steps, strict=True):
        exact = geomwatch.measure(
            net, mean_of_means, window, how=Measurement(quantities=["lambda_max"])
        )
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
    how = Measurement(quantities=["loss", "grad_norm"], precision="training")
    again = GeomwatchCallback(how, every=1)
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
    wanted = {"how": Measurement(quantities=["stability_margin"]), "every": 100}
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
    unclipped = other.step([window[0]])["stability_margin"].value
    assert 0.2 * unclipped < margin < unclipped  # Adam undoes the scale of a gradient, but for eps
    assert rule.norms == pytest.approx(module.norms, rel=1e-5)
    assert min(rule.norms) > 0.01


def test_a_probe_batch_is_measured_instead_of_the_steps_own(Noted, fit):
    module = Noted()
    probe_batch = digits(20)
    start = copy.deepcopy(module.layers)
    how = Measurement(quantities=["loss", "grad_norm"], batch=probe_batch)
    callback = GeomwatchCallback(how, every=1)
    fit(module, [callback], precision="64-true")  # the batch is cast as those of the loader
    record = callback.monitor.history[0]
    assert record.provenance["items"] == 20
    assert record.loss == pytest.approx(mean_of_means(start, [probe_batch]).item(), rel=1e-5)


def test_a_loader_is_measured_as_a_whole_with_its_batches_prepared(Noted, fit):
    module = Noted()
    start = copy.deepcopy(module.layers)
    loader = DataLoader(TensorDataset(*digits(20)), batch_size=10)
    callback = GeomwatchCallback(Measurement(quantities=["loss"], batch=loader), every=4)
    fit(module, [callback], precision="64-true")
    record = callback.monitor.history[0]
    assert record.provenance["items"] == 20
    assert record.loss == pytest.approx(mean_of_means(start, list(loader)).item(), rel=1e-5)


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
