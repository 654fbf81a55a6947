"""A LightningModule on real digits, and a Trainer that writes and shows nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from problems import digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# What Lightning says of a small run on a laptop, and torch of Lightning.
EXPECTED = (
    "ignore:.*treespec, LeafSpec.*",
    "ignore:.*does not have many workers.*",
    "ignore:.*number of training batches.*smaller than the logging interval.*",
    "ignore:.*sampler has shuffling enabled.*",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let these warnings pass, here only."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for line in EXPECTED:
                item.add_marker(pytest.mark.filterwarnings(line))


@pytest.fixture
def host(request: pytest.FixtureRequest) -> Any:
    """Lightning, by the name that a test asks for."""
    return importlib.import_module(getattr(request, "param", "pytorch_lightning"))


@pytest.fixture
def Net(host: Any) -> type[Any]:  # noqa: N802  # it is a class
    """A LightningModule with all that a probe could disturb."""

    class Net(host.LightningModule):
        def __init__(
            self, *, dropout: float = 0.2, norm: bool = True, lr: float = 0.05, kinds: int = 10
        ) -> None:
            super().__init__()
            middle = nn.BatchNorm1d(24) if norm else nn.Identity()
            self.layers = nn.Sequential(
                nn.Linear(64, 24), middle, nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, kinds)
            )
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=kinds)
            self.lr, self.kinds = lr, kinds
            self.losses: list[float] = []  # of each training_step

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

        def loss(self, batch: Any) -> Tensor:
            outputs, targets = self(batch[0]), batch[1] % self.kinds
            self.accuracy(outputs, targets)
            return F.cross_entropy(outputs, targets)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            self.losses.append(loss.item())
            self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log_dict({"accuracy": self.accuracy}, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1] % self.kinds))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    return Net


@pytest.fixture
def load() -> Callable[..., DataLoader]:
    """Return `load(count, size)` -> real digits in batches."""

    def load(count: int = 256, size: int = 32, *, shuffle: bool = True) -> DataLoader:
        return DataLoader(TensorDataset(*digits(count)), batch_size=size, shuffle=shuffle)

    return load


@pytest.fixture
def make_trainer(host: Any, tmp_path: Path) -> Callable[..., Any]:
    """Return a Trainer on the CPU that writes nothing and shows nothing unless asked."""
    plain = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return lambda **options: host.Trainer(**plain | options)


@pytest.fixture
def fit(make_trainer: Callable[..., Any], load: Callable[..., DataLoader]) -> Callable[..., Any]:
    """Return `fit(module, callbacks, **trainer options)` -> the Trainer; 8 batches an epoch."""

    def fit(module: Any, callbacks: Any = (), *, loader: Any = None, **options: Any) -> Any:
        ckpt_path = options.pop("ckpt_path", None)
        trainer = make_trainer(callbacks=list(callbacks), **options)
        torch.manual_seed(1)
        training = load() if loader is None else loader
        validation = load(64, shuffle=False) if hasattr(module, "accuracy") else None
        trainer.fit(module, training, validation, ckpt_path=ckpt_path)
        return trainer

    return fit
