"""Train a convolutional net on real digits in several processes, and watch it.

    torchrun --nproc_per_node 2 integrations/ddp/train.py

It takes seconds on two cores. Each process trains on its part of every batch, in
DistributedDataParallel or, with --shard, on its part of the parameters too (FSDP2). Records of the
joined batches go to runs/ddp/records.jsonl, written by rank zero.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import geomwatch

loss_fn = geomwatch.supervised(F.cross_entropy)
logger = logging.getLogger("train")
Batch = tuple[Tensor, Tensor]


def norm(kind: str, channels: int) -> nn.Module:
    """Batch statistics are those of each rank, or of all with "sync", which wants GPUs."""
    if kind == "group":
        return nn.GroupNorm(4, channels)
    return (nn.SyncBatchNorm if kind == "sync" else nn.BatchNorm2d)(channels)


def convnet(kind: str) -> nn.Sequential:
    """A net of 10 thousand parameters."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        norm(kind, 16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        norm(kind, 32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def shared(model: nn.Sequential, args: argparse.Namespace) -> nn.Module:
    """Let all processes train it: from copies of it, or from its parts."""
    if not args.shard:
        ids = [int(os.environ["LOCAL_RANK"])] if args.device == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)
    for layer in model:
        if any(p.requires_grad for p in layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


@contextlib.contextmanager
def gradients_summed(model: Any, *, now: bool) -> Iterator[None]:
    """Leave it to the last micro-batch of a window to sum gradients over ranks."""
    if isinstance(model, DistributedDataParallel):
        with contextlib.nullcontext() if now else model.no_sync():
            yield
        return
    model.set_requires_gradient_sync(now)
    yield


class Training:
    """What a checkpoint holds: model, optimizer and monitor."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.step = 0
        self.model = shared(convnet(args.norm).to(args.device), args)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=args.lr, momentum=0.9)
        # The same on all ranks: each does its part of every probe. Rank zero speaks and writes.
        self.monitor = geomwatch.Monitor(
            self.model,
            loss_fn,
            self.optimizer,
            every=args.every,
            sinks=[geomwatch.JsonLines(args.out / "records.jsonl")],
        )

    def take_step(self, window: list[Batch], args: argparse.Namespace) -> float:
        """Take one optimizer step on a window of micro-batches; return its loss on this rank."""
        losses = []
        for i, batch in enumerate(window):
            with gradients_summed(self.model, now=i == len(window) - 1):
                loss = loss_fn(self.model, batch)
                (loss / len(window)).backward()
            self.monitor.observe(batch)
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        clipped = nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        self.monitor.step(loss=mean, grad_norm=clipped)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return mean.item()

    def save(self, path: Path) -> None:
        """Write a checkpoint; every rank calls it, and rank zero writes."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=whole)
        monitor = self.monitor.state_dict()
        state = {"model": model, "optimizer": optimizer, "monitor": monitor, "step": self.step}
        if dist.get_rank() == 0:
            torch.save(state, path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; every rank reads it."""
        state = torch.load(path, weights_only=True)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.monitor.load_state_dict(state["monitor"])
        self.step = state["step"]


def windows(args: argparse.Namespace, start: int) -> Iterator[list[Batch]]:
    """Yield what each optimizer step is taken on, from step `start` on: this rank's part."""
    inputs, targets = load_digits(return_X_y=True)  # 1,797 real digits, 8 x 8
    digits = TensorDataset(
        torch.tensor(inputs / 16, dtype=torch.float32, device=args.device),
        torch.tensor(targets, device=args.device),
    )
    sampler = DistributedSampler(digits, seed=args.seed)
    loader = DataLoader(digits, batch_size=args.batch, sampler=sampler, drop_last=True)
    in_epoch = len(loader) // args.accumulation
    for step in itertools.count(start):
        epoch, done = divmod(step, in_epoch)
        if done == 0 or step == start:
            sampler.set_epoch(epoch)
            batches = itertools.islice(loader, done * args.accumulation, None)
        yield [tuple(batch) for batch in itertools.islice(batches, args.accumulation)]


def main(args: argparse.Namespace) -> None:
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    args.out.mkdir(parents=True, exist_ok=True)
    training = Training(args)
    if args.resume is not None:
        training.load(args.resume)
    loss = float("nan")
    with training.monitor as monitor:
        for window in windows(args, training.step):
            if training.step == args.steps:
                break
            loss = training.take_step(window, args)
            if training.step == args.checkpoint:
                training.save(args.out / "checkpoint.pt")
    training.save(args.out / "last.pt")
    if dist.get_rank() == 0:
        logger.info("last loss %.3f, %d probes", loss, len(monitor.history))
    dist.barrier()  # gloo's threads may still be letting go of the last tensors
    dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--every", type=int, default=50, help="steps between probes when calm")
    parser.add_argument("--batch", type=int, default=16, help="digits in a rank's micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--clip", type=float, default=5.0, help="largest gradient norm")
    parser.add_argument("--norm", choices=["group", "batch", "sync"], default="group")
    parser.add_argument("--shard", action="store_true", help="cut the parameters too (FSDP2)")
    parser.add_argument("--checkpoint", type=int, help="save one after so many steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/ddp"))
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)-8s %(message)s")
    main(arguments())
