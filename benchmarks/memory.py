"""How much memory does a probe need beside a training step, whole and in micro-batches?

Trains a GPT-2-like net with AdamW and counts the bytes of live tensors from torch's own record of
allocations, above what is held between steps (weights, their gradients and the optimizer's state).
Resident memory would count what the allocator keeps, which says nothing. Writes
docs/benchmarks/memory.md.

    python benchmarks/memory.py            # a few minutes
    python benchmarks/memory.py --quick    # seconds, prints only
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness.version import written_by
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel

import geomwatch

OUT = Path(__file__).parents[1] / "docs/benchmarks/memory.md"
PROBES = 2  # the first, which also checks the model, and a recurring one


@dataclass(frozen=True)
class Size:
    """A GPT-2-like net and its batch."""

    layers: int
    width: int
    batch: int
    length: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.width} wide, {self.batch} x {self.length} tokens"


QUICK = Size(layers=2, width=32, batch=16, length=64, vocabulary=128)
# Larger ones fill the memory with the record of their allocations.
SIZES = (QUICK, Size(layers=2, width=128, batch=16, length=128, vocabulary=1000))


def peak(run: Callable[[], object]) -> int:
    """Run something; return the most bytes that tensors allocated meanwhile took at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    kineto = seen.profiler.kineto_results
    changes = [event for event in kineto.events() if event.name() == "[memory]"]
    held = most = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        most = max(most, held)
    return most


class Training:
    """A GPT-2-like net that takes AdamW steps on random tokens."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=size.vocabulary,
            n_positions=size.length,
            n_embd=size.width,
            n_layer=size.layers,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = GPT2LMHeadModel(config)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        tokens = torch.randint(0, size.vocabulary, (size.batch, size.length))
        self.batch = {"input_ids": tokens, "labels": tokens}
        self.backward()
        self.optimizer.step()  # its state is there from here on

    def backward(self) -> None:
        """Compute the gradients."""
        self.optimizer.zero_grad(set_to_none=False)
        geomwatch.model_loss(self.model, self.batch).backward()


def step_peak(size: Size) -> int:
    """Peak of a training step."""
    training = Training(size)
    return max(peak(training.backward), peak(training.optimizer.step))


def probe_peaks(size: Size, micro_batch: int | None) -> list[int]:
    """Peaks of the probes: all default quantities, the slow ones included."""
    training = Training(size)
    monitor = geomwatch.Monitor(
        training.model,
        geomwatch.model_loss,
        training.optimizer,
        how=geomwatch.Measurement(micro_batch=micro_batch),
        every=1,
    )
    found = []
    for _ in range(PROBES):
        training.backward()
        found.append(peak(lambda: monitor.step(training.batch)))
        training.optimizer.step()
    return found


def table_of(size: Size) -> list[str]:
    """Rows of one net, as they are measured."""
    step = step_peak(size)
    rows = [f"| {size} | training step | {step / 2**20:.0f} | 1.00 |"]
    pieces = {"whole batch": None, "b/4": size.batch // 4, "b/8": size.batch // 8}
    for name, micro_batch in pieces.items():
        first, later = probe_peaks(size, micro_batch)
        for kind, found in (("first", first), ("recurring", later)):
            rows.append(f"| | {kind} probe, {name} | {found / 2**20:.0f} | {found / step:.2f} |")
    print("\n".join(rows), flush=True)
    return rows


def main() -> None:
    """Measure every net and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny net; write nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rows = [row for size in ((QUICK,) if quick else SIZES) for row in table_of(size)]
    table: list[Any] = [
        "# Memory of a probe",
        "",
        f"{written_by('memory.py')} GPT-2-like nets with AdamW on a CPU; the most "
        "bytes of tensors alive at once, above what is held between steps (weights, gradients, "
        "optimizer state), and in units of a training step's. All default quantities.",
        "",
        "| net | what | peak, MiB | in training steps |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    if not quick:
        OUT.write_text("\n".join(table))


if __name__ == "__main__":
    main()
