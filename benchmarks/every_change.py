"""What is measured once a run has changed, and what is right?

Trains all cases of `benchmarks/changing/` with and without a monitor, in a raw loop, accelerate,
Lightning and the Hugging Face Trainer, and writes docs/benchmarks/changes.md. Two minutes.

    python benchmarks/every_change.py            # all, and the page
    python benchmarks/every_change.py frozen     # those with a word in their name, to the terminal
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from changing.net import CHANGE
from changing.run import EVERY
from changing.table import Verdict, cases, judge
from harness.version import written_by

OUT = Path(__file__).parents[1] / "docs/benchmarks/changes.md"
PAGE = """# Runs that change on the way

{written}
Before step {change} something changes; a record comes every {every} steps. Each record is held
against a dense Hessian in float64, taken by torch alone: lambda_max of all that is trained, and the
margin of the step that will be taken, with the parameters, rates and state of the optimizer that
steps and the length of the gradient that is there. The table shows the last record, with what is
right in brackets. "same" means that weights, optimizer state and random state are bit for bit those
of the run without a monitor. {right} of {count} are right in all of their {records} records.

| change | host | optimizer | step | λ_max | margin | bits | verdict |
|---|---|---|---|---|---|---|---|
{rows}
"""


def main(words: Sequence[str] = ()) -> int:
    """Run cases; return how many are wrong."""
    for host in ("pytorch_lightning", "lightning_utilities"):
        logging.getLogger(host).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    chosen = [case for case in cases() if all(word in case.name for word in words)]
    verdicts = []
    for case in chosen:
        verdicts.append(judge(case))
        wrong = verdicts[-1].wrong
        print(f"{'WRONG' if wrong else 'right'}  {case.name}: {'; '.join(wrong[:3])}", flush=True)
    if not words:
        OUT.write_text(page(verdicts), encoding="utf-8")
    return sum(bool(v.wrong) for v in verdicts)


def page(verdicts: Sequence[Verdict]) -> str:
    """Return the page."""
    return PAGE.format(
        written=written_by(Path(__file__).name),
        change=CHANGE,
        every=EVERY,
        right=sum(not v.wrong for v in verdicts),
        count=len(verdicts),
        records=sum(v.records for v in verdicts),
        rows="\n".join(map(_row, verdicts)),
    )


def _row(v: Verdict) -> str:
    case = v.case
    clip = "" if case.clip is None else f"clip {case.clip:g}"
    whole = "" if case.divided else ", not divided"
    window = "" if case.accumulate == 1 else f"{case.accumulate} micro-batches{whole}"
    step = ", ".join(filter(None, [clip, window])) or "plain"
    verdict = "**wrong**" if v.wrong else "right"
    bits = "same" if v.identical else "**other**"
    cells = [case.change, case.host, case.optimizer, step, v.lambda_max, v.margin, bits, verdict]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
