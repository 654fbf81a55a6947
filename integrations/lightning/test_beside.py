"""Beside Lightning's own callbacks, loaders and compiled modules: bit-identical there too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import digits
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

CALLBACKS: dict[str, Callable[[Any], Any]] = {
    "StochasticWeightAveraging": lambda kind: kind(swa_lrs=1e-2, swa_epoch_start=1),
    "EMAWeightAveraging": lambda kind: kind(),
    "GradientAccumulationScheduler": lambda kind: kind({0: 1, 1: 2}),
    "LearningRateFinder": lambda kind: kind(num_training_steps=8, early_stop_threshold=None),
    "BackboneFinetuning": lambda kind: kind(1, backbone_initial_lr=0.01),
}


def steps(callback: Any) -> list[int]:
    assert all(record["stability_margin"].value for record in callback.monitor.history)
    return [record.step for record in callback.monitor.history]


@pytest.mark.filterwarnings("ignore")  # what Lightning's own callbacks warn of
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_callback_of_lightnings_own(Net, host, assert_bit_identical, name):
    kind = getattr(host.callbacks, name, None)
    if kind is None:
        pytest.skip(f"this Lightning has no {name}")

    class WithBackbone(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(64, 64)

        def forward(self, x: Any) -> Any:
            return super().forward(self.backbone(x))

        def configure_optimizers(self) -> Any:
            if name == "BackboneFinetuning":  # it adds the backbone later
                return torch.optim.SGD(self.layers.parameters(), lr=self.lr)
            return super().configure_optimizers()

    callback = assert_bit_identical(
        WithBackbone, others=lambda: [CALLBACKS[name](kind)], max_epochs=2
    )
    last = 9 if name == "GradientAccumulationScheduler" else 15
    thawed = [8] if name == "BackboneFinetuning" else []  # other parameters are measured at once
    assert steps(callback) == sorted([*range(0, last + 1, 3), *thawed])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_net_that_is_compiled(Net, assert_bit_identical, backend):
    class Compiled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.compiled = torch.compile(self.layers, backend=backend)

        def forward(self, x: Any) -> Any:
            return self.compiled(x)

    assert steps(assert_bit_identical(Compiled)) == [0, 3, 6]


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        inputs, targets = digits(256)
        return zip(inputs.split(32), targets.split(32), strict=True)


@pytest.mark.parametrize("kind", ["a stream without length", "several loaders"])
def test_another_source_of_batches(Net, assert_bit_identical, load, kind):
    class Several(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            chosen = batch["first"] if isinstance(batch, dict) else batch
            return super().training_step(chosen, batch_idx)

    loader = DataLoader(Stream(), batch_size=None)
    if kind == "several loaders":
        loader = {"first": load(shuffle=False), "second": load(shuffle=False)}
    assert steps(assert_bit_identical(Several, loader=loader)) == [0, 3, 6]


def test_a_validation_step_that_calls_training_step(Net, assert_bit_identical):
    class Shared(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    callback = assert_bit_identical(Shared, val_check_interval=3, max_epochs=2)
    assert steps(callback) == [0, 3, 6, 9, 12, 15]
