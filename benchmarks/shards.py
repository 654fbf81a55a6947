"""What does each way to measure a model that fully_shard has cut take: a replica, or local shards?

Trains an MLP of 4.2 million weights with AdamW on a CPU, over gloo, and tells what a training step
and a probe take on the first rank: seconds, and memory in units of a whole vector, the peak above
what is held before. Writes docs/benchmarks/shards.md. Linux. A minute.

    MALLOC_MMAP_THRESHOLD_=65536 torchrun --nproc-per-node 2 benchmarks/shards.py

The threshold gives blocks back as they are freed, so that resident memory is that of tensors (the
profiler misses what gloo's threads free).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness.version import written_by
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import geomwatch

OUT = Path(__file__).parents[1] / "docs/benchmarks/shards.md"
WIDTH, BLOCKS, ITEMS = 512, 8, 64
WAYS = {"replica": "double_backward", "local shards": "finite_difference"}
QUANTITIES = ["loss", "grad_norm", "lambda_max", "stability_margin", "batch_sharpness", "trace"]
PAGE = """# Measuring a model that fully_shard has cut

{written} MLP of 4.2 million weights, AdamW, {ranks} ranks over gloo on
a CPU that others use too. Memory is the peak above what is held between steps, on the first rank,
in whole vectors.

| way | {columns} |
{line}|
{rows}
"""


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add to x."""
        return x + self.narrow(F.gelu(self.wide(self.norm(x))))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of random labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def measure(hvp: str) -> dict[str, Any]:
    """Take steps and probes in one way."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, 10))
    for block in model[:-1]:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    batch = torch.randn(ITEMS, WIDTH), torch.randint(0, 10, (ITEMS,))
    monitor = geomwatch.Monitor(
        model,
        loss_fn,
        optimizer,
        how=geomwatch.Measurement(quantities=QUANTITIES, hvp=hvp),
        every=1,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        loss_fn(model, batch).backward()

    step()
    optimizer.step()  # its state is there from here on
    vector = 4 * sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {}
    for name, run in {"step": step, "first probe": None, "next probe": None}.items():
        step()
        seconds, most = cost_of(run or (lambda: monitor.step(batch)))
        found |= {f"{name}, s": seconds, f"{name}, vectors": most / vector}
        optimizer.step()
    last = monitor.history[-1]
    found["its HVPs"] = last.provenance["hvps"]
    return found | {"lambda_max": last["lambda_max"].value}


def cost_of(run: Callable[[], object]) -> tuple[float, int]:
    """Return the seconds that something takes, and the bytes its memory rises by meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, start = resident("VmRSS"), time.perf_counter()
    run()
    return time.perf_counter() - start, resident("VmHWM") - before


def resident(kind: str) -> int:
    """Return the bytes of resident memory, now or at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def main() -> None:
    """Measure both ways and write the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {name: measure(hvp) for name, hvp in WAYS.items()}
    if dist.get_rank() == 0:
        text = report(found, dist.get_world_size())
        print(text)
        OUT.write_text(text, encoding="utf-8")
    dist.destroy_process_group()


def report(found: dict[str, dict[str, Any]], ranks: int) -> str:
    """Return the page: a row a way."""
    columns = list(next(iter(found.values())))
    rows = [
        f"| {way} | " + " | ".join(f"{values[c]:.4g}" for c in columns) + " |"
        for way, values in found.items()
    ]
    return PAGE.format(
        written=written_by("shards.py"),
        ranks=ranks,
        columns=" | ".join(columns),
        line="|---" * (len(columns) + 1),
        rows="\n".join(rows),
    )


if __name__ == "__main__":
    main()
