"""What controllers turn in a real fit(): rates within steps, clipping, accumulation, samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import digits
from scripted import Scripted
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import geomwatch
from geomwatch.controllers import LearningRateCap, ResizableBatchSampler
from geomwatch.integrations.lightning import GeomwatchCallback

BOTH = pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)


def scripted(knob: str, moves: dict[int, float], **options: Any) -> GeomwatchCallback:
    return GeomwatchCallback(
        how=geomwatch.Measurement(quantities=["loss"]),
        controllers=[Scripted(knob, moves)],
        **options,
    )


@BOTH
def test_a_rate_far_too_large_is_lowered_within_the_very_first_step(Net, fit, host):
    callback = GeomwatchCallback(controllers=[LearningRateCap()])
    monitor = host.callbacks.LearningRateMonitor("step")
    log = host.loggers.CSVLogger
    module = Net(dropout=0.0, lr=20.0)
    trainer = fit(module, [callback, monitor], max_epochs=6, logger=log("."), log_every_n_steps=1)
    assert callback.monitor.adjustments[0].step == 0
    assert callback.monitor.adjustments[0].after < 0.5
    assert module.losses[-1] < 1.5
    assert float(trainer.callback_metrics["lr-SGD"]) == 20.0
    assert 0 < float(trainer.callback_metrics["geom/lr_scale"]) < 1
    assert trainer.optimizers[0].param_groups[0]["lr"] == 20.0


def test_a_decision_inside_the_closure_holds_for_its_own_step(Net, fit):
    taken: list[float] = []

    class Own(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (t + 1))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.bias = self.layers[-1].bias
            self.before, self.gradient = self.bias.detach().clone(), self.bias.grad.clone()

        def on_train_batch_end(self, *_: Any) -> None:
            moved = self.before - self.bias.detach()
            taken.append(float((moved / self.gradient).median()))

    fit(Own(dropout=0.0, norm=False), [scripted("lr_scale", {1: 0.125, 6: float("inf")})])
    user = [0.5 / (t + 1) for t in range(8)]
    expected = [lr if t == 0 or t >= 6 else min(lr, 0.125) for t, lr in enumerate(user)]
    assert taken == pytest.approx(expected, rel=1e-3)


def test_clipping_goes_down_and_comes_back_to_the_trainers_own(Net, fit):
    seen = []

    class Own(Net):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            seen.append(self.trainer.gradient_clip_val)

    callback = scripted("clip_norm", {1: 0.25, 3: 5.0, 5: float("inf")})
    trainer = fit(Own(), [callback], gradient_clip_val=1.0)
    assert seen == [1.0, 1.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0]
    assert [a.after for a in callback.monitor.adjustments] == [0.25, 5.0, float("inf")]
    assert trainer.gradient_clip_val == 1.0


def test_a_module_that_clips_itself_gets_advice(Net, fit):
    class Own(Net):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.5)

    callback = scripted("clip_norm", {1: 0.25, 2: 0.5})
    trainer = fit(Own(), [callback])
    (advice,) = callback.monitor.adjustments
    assert advice.effect == "advice"
    assert "The module's own configure_gradient_clipping() does it" in advice.reason
    assert trainer.gradient_clip_val is None


@BOTH
def test_accumulation_changes_only_where_a_window_ends(Noted, fit):
    module = Noted()
    callback = scripted("batch_scale", {2: 2.0}, rules=[])
    trainer = fit(module, [callback], max_epochs=2)
    # wanted at the third batch, in force from the fifth on: batches of 32
    assert [len(window) for _, window, _ in module.steps] == [1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    assert trainer.accumulate_grad_batches == 1  # given back


def test_windows_that_widen_are_measured_whole(Noted, fit):
    module = Noted()
    callback = GeomwatchCallback(controllers=[Scripted("batch_scale", {0: 2.0})], every=1)
    fit(module, [callback])
    losses = [loss for _, _, loss in module.steps]
    assert [r.loss for r in callback.monitor.history] == pytest.approx(losses, rel=1e-5)
    assert [r.provenance["items"] for r in callback.monitor.history][-1] == 64


def test_a_resizable_sampler_is_found_in_the_loader_that_lightning_uses(Net, fit):
    sizes = []

    class Own(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not geomwatch.is_probing():
                sizes.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    data = TensorDataset(*digits(256))
    loader = DataLoader(data, batch_sampler=ResizableBatchSampler(RandomSampler(data), 32))
    fit(Own(), [scripted("batch_scale", {1: 2.0})], loader=loader)
    assert sizes == [32, 32, 64, 64, 64]


def test_a_scheduler_of_accumulation_keeps_its_knob(Net, fit, host):
    callback = scripted("batch_scale", {1: 2.0})
    fit(Net(), [callback, host.callbacks.GradientAccumulationScheduler({0: 2})])
    (advice,) = callback.monitor.adjustments
    assert "GradientAccumulationScheduler sets the accumulation" in advice.reason


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_holds_the_users_rate_and_a_resumed_run_the_cap(Net, fit, host, tmp_path):
    def run(epochs: int, **options: Any) -> Any:
        callback = GeomwatchCallback(controllers=[LearningRateCap()], every=4)
        checkpoints = host.callbacks.ModelCheckpoint(tmp_path, save_last=True)
        module = Net(dropout=0.0, lr=20.0)
        fit(
            module,
            [callback, checkpoints],
            max_epochs=epochs,
            enable_checkpointing=True,
            **options,
        )
        return callback.monitor

    before = run(1)
    path = tmp_path / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 20.0
    after = run(2, ckpt_path=path)
    assert after.history[0].step == 8
    first = after.history[0].knobs["lr_scale"]
    assert first < 4 * before.history[-1].knobs["lr_scale"]


def test_each_optimizer_of_a_module_gets_a_controller_of_its_own(Net, fit):
    class Two(Net):
        def __init__(self) -> None:
            super().__init__(dropout=0.0, norm=False)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self) -> Any:
            halves = self.layers[0].parameters(), self.layers[-1].parameters()
            return [torch.optim.SGD(p, lr=lr) for p, lr in zip(halves, (500.0, 1e-3), strict=True)]

    def loss(module: Any, batch: Any) -> torch.Tensor:
        return module.loss(batch)

    cap = LearningRateCap()
    callback = GeomwatchCallback(controllers=[cap], loss_fn={"first": loss, "last": loss})
    fit(Two(), [callback])
    first, last = callback.monitor["first"], callback.monitor["last"]
    assert first.history[0].knobs["lr_scale"] < 0.1
    assert {r.knobs["lr_scale"] for r in last.history} == {1.0}
    assert not cap.state_dict()["base_rate"]["recent"]  # the user's own is as it was
