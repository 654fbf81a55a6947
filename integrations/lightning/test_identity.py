"""With the callback on, training is bit for bit what it is without it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from geomwatch import is_probing
from geomwatch.integrations.lightning import GeomwatchCallback

BOTH = pytest.mark.parametrize("host", ["lightning.pytorch", "pytorch_lightning"], indirect=True)


def steps(callback: GeomwatchCallback) -> list[int]:
    assert all(record["stability_margin"].value for record in callback.monitor.history)
    return [record.step for record in callback.monitor.history]


@BOTH
def test_training_with_dropout_batchnorm_metrics_and_validation(Net, assert_bit_identical):
    callback = assert_bit_identical(Net, max_epochs=2)
    assert steps(callback) == [0, 3, 6, 9, 12, 15]


@BOTH
def test_training_with_accumulation(Net, assert_bit_identical):
    callback = assert_bit_identical(Net, accumulate_grad_batches=2, max_epochs=2)
    assert steps(callback) == [0, 3, 6]


def test_accumulation_windows_that_end_with_the_epoch(Net, assert_bit_identical, load):
    callback = assert_bit_identical(
        Net, accumulate_grad_batches=3, max_epochs=2, loader=load(250, 32, shuffle=False)
    )
    assert steps(callback) == [0, 3]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true", "bf16-true"])
def test_training_at_another_precision(Net, assert_bit_identical, precision):
    callback = assert_bit_identical(Net, precision=precision)
    assert steps(callback) == [0, 3, 6]
    dtype = "float64" if precision == "64-true" else "float32"
    assert {record.provenance["dtype"] for record in callback.monitor.history} == {dtype}


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU.*")
def test_half_precision_that_falls_back_to_bfloat16_on_a_cpu(Net, assert_bit_identical):
    assert steps(assert_bit_identical(Net, precision="16-mixed")) == [0, 3, 6]


@pytest.mark.parametrize("fused", [False, True])
def test_training_under_a_grad_scaler(Net, host, assert_bit_identical, fused):
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3, fused=fused)

    def scaled() -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        return host.plugins.MixedPrecision("16-mixed", "cpu", scaler)

    assert steps(assert_bit_identical(Fused, plugins=scaled)) == [0, 3, 6]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_training_with_clipping(Net, assert_bit_identical, algorithm):
    callback = assert_bit_identical(Net, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
    assert steps(callback) == [0, 3, 6]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_training_steps_that_are_left_out(Net, assert_bit_identical):
    class Choosy(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if batch_idx % 4 else None

    callback = assert_bit_identical(Choosy, max_epochs=2)
    # Lightning steps without a gradient at 0, 4, 8 and 12
    assert steps(callback) == [1, 3, 6, 9, 13, 15]


def test_an_optimizer_that_evaluates_its_closure_repeatedly(Net, assert_bit_identical):
    class Newton(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    callback = assert_bit_identical(lambda: Newton(dropout=0.0, norm=False))
    assert [record.step for record in callback.monitor.history] == [0, 3, 6]


def test_state_that_the_loss_changes_is_put_back(Net, assert_bit_identical):
    class Stateful(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, Any] = {"batches": 0, "sums": [], "mean": torch.zeros(64)}
            self.rng = torch.Generator().manual_seed(0)

        def training_step(self, batch, batch_idx):
            self.seen["batches"] += 1
            self.seen["sums"].append(float(batch[0].sum()))
            self.seen["mean"].mul_(0.9).add_(batch[0].mean(0))
            self.trainer.noted = self.seen["batches"]
            torch.rand(1, generator=self.rng)
            self.losses += [self.seen["batches"], len(self.seen["sums"]), self.trainer.noted]
            self.losses += [float(self.seen["mean"].sum()), float(self.rng.get_state().sum())]
            return super().training_step(batch, batch_idx)

    assert_bit_identical(Stateful)


def test_metrics_with_large_and_growing_states_are_put_back(Net, assert_bit_identical, caplog):
    class Metric(torchmetrics.Metric):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("moments", torch.zeros(1001, 1001), dist_reduce_fx="sum")
            self.add_state("seen", [], dist_reduce_fx="cat")

        def update(self, outputs: Tensor) -> None:
            self.moments.add_(outputs.sum().detach())
            self.seen.append(outputs.detach())

        def compute(self) -> Tensor:
            return self.moments.mean() + torch.cat(self.seen).mean()

    class Measured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metric = Metric()

        def forward(self, x: Tensor) -> Tensor:
            outputs = super().forward(x)
            if self.training:
                self.metric(outputs)
                self.log("metric", self.metric)
            return outputs

    assert_bit_identical(Measured)
    assert "can't put back" not in caplog.text


def test_logs_prints_and_images_of_a_training_step_come_once(Net, fit, host, tmp_path, capsys):
    class Talkative(Net):
        def training_step(self, batch, batch_idx):
            self.print(f"batch {batch_idx}")
            self.logger.experiment.log_metrics({"direct": 1.0}, step=batch_idx)
            for logger in self.loggers:
                logger.log_metrics({"each": 1.0}, step=batch_idx)
            return super().training_step(batch, batch_idx)

    log = host.loggers.CSVLogger(tmp_path)
    trainer = fit(Talkative(), [GeomwatchCallback(every=2)], logger=log, log_every_n_steps=1)
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert capsys.readouterr().out.splitlines() == [f"batch {i}" for i in range(8)]
    assert [row["step"] for row in rows if row["direct"]] == [str(i) for i in range(8)]
    assert sum(bool(row["each"]) for row in rows) == 8


def generator_loss(module: Any, batch: Any) -> Tensor:
    return F.softplus(-module.discriminator(module.generator(noise(batch)))).mean()


def discriminator_loss(module: Any, batch: Any) -> Tensor:
    false = module.generator(noise(batch)).detach()
    real = F.softplus(-module.discriminator(batch[0])).mean()
    return real + F.softplus(module.discriminator(false)).mean()


def noise(batch: Any) -> Tensor:
    return batch[0][:, :8] + 0.1 * torch.randn(len(batch[0]), 8)


def gan(host: Any) -> Any:
    class Gan(host.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.losses: list[float] = []
            self.generator = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 64))
            self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.1), nn.Linear(16, 1))

        def training_step(self, batch, batch_idx):
            assert not is_probing()
            for optimizer, loss_fn in zip(
                self.optimizers(), (generator_loss, discriminator_loss), strict=True
            ):
                self.toggle_optimizer(optimizer)
                loss = loss_fn(self, batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                optimizer.step()
                self.untoggle_optimizer(optimizer)
                self.losses.append(loss.item())
                self.log("loss", loss)

        def configure_optimizers(self):
            parts = self.generator, self.discriminator
            return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in parts]

    return Gan()


def test_a_gan_trained_by_hand(host, assert_bit_identical):
    losses = {"generator": generator_loss, "discriminator": discriminator_loss}
    callback = assert_bit_identical(lambda: gan(host), loss_fn=losses)
    for name in losses:
        history = callback.monitor[name].history
        assert [record.step for record in history] == [0, 3, 6]
        assert all(record["lambda_max"].value for record in history)


def test_the_callback_leaves_nothing_behind_on_module_and_optimizer(Net, fit):
    module = Net()
    before = set(vars(module))
    trainer = fit(module, [GeomwatchCallback()])
    assert set(vars(module)) - before <= {"_hparams"}
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_nothing_at_all_is_done_when_geomwatch_is_switched_off(Net, fit, monkeypatch):
    monkeypatch.setenv("GEOMWATCH_DISABLE", "1")
    callback = GeomwatchCallback(every=1)
    trainer = fit(Net(), [callback])
    assert callback.monitor is None
    assert not [name for name in trainer.callback_metrics if name.startswith("geom/")]
