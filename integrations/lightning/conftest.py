"""A LightningModule on real digits, and a Trainer that writes and shows nothing."""

from __future__ import annotations

import copy
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from problems import digits
from states import rng_states, same
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from geomwatch.integrations.lightning import GeomwatchCallback

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
    return pytest.importorskip(getattr(request, "param", "pytorch_lightning"))


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


def everything(trainer: Any, module: Any) -> dict[str, Any]:
    """All that a probe could disturb, after a fit()."""
    metrics = trainer.callback_metrics | trainer.progress_bar_metrics
    state = {
        "weights and buffers": dict(module.state_dict()),
        "gradients": [p.grad for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "random": rng_states(),
        "metrics": {k: v for k, v in metrics.items() if not k.startswith("geom/")},
        "logged": logged(trainer),
        "losses": module.losses,
        "attributes": sorted(vars(module)),
        "steps": trainer.global_step,
    }
    return copy.deepcopy(state)


def logged(trainer: Any) -> list[dict[str, str]]:
    """The rows of the CSV log, without what is ours."""
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = [dict(row) for row in csv.DictReader(file)]
    own = [{k: v for k, v in row.items() if v and not k.startswith("geom/")} for row in rows]
    return [row for row in own if set(row) - {"step"}]


@pytest.fixture
def assert_bit_identical(fit, host, tmp_path) -> Callable[..., GeomwatchCallback]:
    """Fit without and with the callback; return it."""

    def check(make: Callable[[], Any], **options: Any) -> GeomwatchCallback:
        seen = []
        callback = GeomwatchCallback(every=3, loss_fn=options.pop("loss_fn", None))
        others = options.pop("others", list)  # callbacks beside it
        for name, callbacks in (("off", others()), ("on", [callback, *others()])):
            torch.manual_seed(3)
            module = make()
            log = host.loggers.CSVLogger(tmp_path, name=name)
            chosen = {k: v() if k == "plugins" else v for k, v in options.items()}
            trainer = fit(module, callbacks, logger=log, log_every_n_steps=1, **chosen)
            seen.append(everything(trainer, module))
        assert [key for key in seen[0] if not same(seen[0][key], seen[1][key])] == []
        assert len(seen[0]["logged"]) > 2
        return callback

    return check
