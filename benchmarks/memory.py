"""How much memory a probe needs beside a training step, whole and in micro-batches.

Each row is a process of its own that trains a GPT-2-like net with AdamW, with or without a
monitor, and reports the growth of its peak resident memory over what it held before the first
step. Writes docs/benchmarks/memory.md. About a minute.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import geomwatch

OUT = Path("docs/benchmarks/memory.md")
BATCH, LENGTH, VOCABULARY = 16, 128, 1000
VARIANTS: dict[str, dict[str, Any] | None] = {
    "training alone": None,
    "probes of the whole batch": {},
    "probes with micro_batch = b/4": {"micro_batch": BATCH // 4},
    "probes with micro_batch = b/8": {"micro_batch": BATCH // 8},
}


def train(options: dict[str, Any] | None, steps: int = 2) -> float:
    """Train for a few steps, probing at each; return the growth of the peak in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    batch = {"input_ids": tokens, "labels": tokens}
    monitor = None
    if options is not None:
        monitor = geomwatch.Monitor(
            model, geomwatch.model_loss, optimizer, every=1, schedule="fixed", **options
        )
    before = peak()
    for _ in range(steps):
        optimizer.zero_grad()
        geomwatch.model_loss(model, batch).backward()
        if monitor is not None and monitor.step(batch) is None:
            raise SystemExit("a probe failed")
        optimizer.step()
    return peak() - before


def peak() -> float:
    """The peak of the resident memory so far, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> float:
    """Run one variant in a process of its own."""
    command = [sys.executable, __file__, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure every variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=VARIANTS, help="measure one variant in this process")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(train(VARIANTS[only])))
        return
    found = {name: measure(name) for name in VARIANTS}
    step = found["training alone"]
    rows = [f"| {name} | {mib:.0f} | {(mib - step) / step:.2f} |" for name, mib in found.items()]
    table = "\n".join(
        [
            "# Memory of a probe",
            "",
            "Written by `python benchmarks/memory.py`. A GPT-2-like net (2 layers, 128 wide, "
            f"{BATCH} x {LENGTH} tokens, AdamW) on a CPU; peak resident memory above that before "
            "the first step, and how far it lies above the peak of training alone, in units of "
            "that. All default quantities, the slow ones included.",
            "",
            "| | peak, MiB | above training, in training steps |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
    OUT.write_text(table)
    print(table)


if __name__ == "__main__":
    main()
