"""Train a convolutional net on real digits in a plain torch loop, and watch it.

    python integrations/raw_loop/train.py

It takes seconds on one core. The loop has what a real one has: gradient accumulation, autocast, a
GradScaler, clipping, checkpoints. Records go to runs/raw_loop/records.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import geomwatch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
loss_fn = geomwatch.supervised(F.cross_entropy)
logger = logging.getLogger("train")


def convnet() -> nn.Module:
    """A net with batch statistics and dropout, 10 thousand parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(512, 10),
    )


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 real 8x8 digits of scikit-learn."""
    inputs, targets = load_digits(return_X_y=True)
    return torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(targets)


def micro_batches(step: int, args: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw what one optimizer step is taken on, the same for the same step and seed."""
    inputs, targets = digits()
    rng = torch.Generator().manual_seed(1_000_000 * args.seed + step)
    for _ in range(args.accumulation):
        chosen = torch.randint(0, len(inputs), (args.batch,), generator=rng)
        yield inputs[chosen].to(args.device), targets[chosen].to(args.device)


class Training:
    """What a checkpoint holds: model, optimizer, scaler and monitor."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.step = 0
        self.model = convnet().to(args.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=args.lr, momentum=0.9)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.monitor = geomwatch.Monitor(
            self.model,
            loss_fn,
            self.optimizer,
            every=args.every,
            sinks=[geomwatch.JsonLines(args.out / "records.jsonl")],
        )

    def take_step(self, args: argparse.Namespace) -> float:
        """Take one optimizer step on a window of micro-batches; return its loss."""
        losses = []
        for batch in micro_batches(self.step, args):
            dtype = PRECISIONS[args.precision]
            with torch.autocast(args.device, dtype=dtype, enabled=dtype is not None):
                loss = loss_fn(self.model, batch)
            self.scaler.scale(loss / args.accumulation).backward()
            self.monitor.observe(batch)
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        self.monitor.step(loss=mean, grad_norm=norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return mean.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        parts = ("model", "optimizer", "scaler", "monitor")
        state: dict[str, Any] = {part: getattr(self, part).state_dict() for part in parts}
        torch.save(state | {"step": self.step, "rng": torch.get_rng_state()}, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.step = state.pop("step")
        torch.set_rng_state(state.pop("rng"))
        for part, value in state.items():
            getattr(self, part).load_state_dict(value)


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args)
    if args.resume is not None:
        training.load(args.resume)
    loss = float("nan")
    with training.monitor as monitor:
        while training.step < args.steps:
            loss = training.take_step(args)
            if training.step == args.checkpoint:
                training.save(args.out / "checkpoint.pt")
    logger.info("last loss %.3f, %d probes", loss, len(monitor.history))
    torch.save(training.model.state_dict(), args.out / "model.pt")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--every", type=int, default=50, help="steps between probes when calm")
    parser.add_argument("--batch", type=int, default=32, help="digits in a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--clip", type=float, default=5.0, help="largest gradient norm")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    parser.add_argument("--checkpoint", type=int, help="save one after so many steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/raw_loop"))
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)-8s %(message)s")
    main(arguments())
