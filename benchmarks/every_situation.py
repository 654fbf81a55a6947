"""What does geomwatch say in each situation that runs are found in, and what is right?

Runs all of `benchmarks/situations/`, where each function is one situation with its own reference,
and writes docs/benchmarks/situations.md. Two minutes.

    python benchmarks/every_situation.py            # all, and the page
    python benchmarks/every_situation.py items      # one kind, to the terminal only
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from harness.version import written_by
from situations.table import KINDS, Found, Situation, everything

OUT = Path(__file__).parents[1] / "docs/benchmarks/situations.md"
TITLES = {
    "items": "What one item is",
    "couplings": "Losses that are no mean over items",
    "windows": "Micro-batches of one step",
    "batches": "Batches and weights of any type",
    "constants": "Losses that hold part of themselves constant",
}
PAGE = """# Situations, and what is right in each

{written}
References know nothing of geomwatch: dense Hessians in float64, gradients of single items, losses
of whole batches. {right} of {count} are right.
"""


def main(kinds: Sequence[str] = ()) -> int:
    """Run situations; return how many are wrong."""
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    chosen = [s for s in everything() if not kinds or s.kind in kinds]
    results = [(s, s.run()) for s in chosen]
    for s, found in results:
        print(f"{'right' if found.right else 'WRONG'}  {s.name}: {found.said}; {found.reference}")
    if not kinds:
        OUT.write_text(page(results), encoding="utf-8")
    return sum(not found.right for _, found in results)


def page(results: Sequence[tuple[Situation, Found]]) -> str:
    """Return the page."""
    right = sum(found.right for _, found in results)
    written = written_by(Path(__file__).name)
    parts = [PAGE.format(written=written, right=right, count=len(results))]
    for kind in KINDS:
        rows = [
            f"| {_cell(s.name)} | {_cell(f.said)} | {_cell(f.reference)} | "
            f"{'right' if f.right else '**wrong**'} |\n"
            for s, f in results
            if s.kind == kind
        ]
        head = "| situation | geomwatch | reference | verdict |\n|---|---|---|---|\n"
        parts.append(f"## {TITLES.get(kind, kind)}\n\n{head}{''.join(rows)}")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
