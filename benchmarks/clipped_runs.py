"""Are runs with clipped gradients left in peace while they train well, and warned of if not?

Trains two nets under three optimizers at five rates and three clips, and without one, in a raw
loop, and those that train well in Lightning and the Hugging Face Trainer too; writes
docs/benchmarks/clipping.md. Three minutes.

    python benchmarks/clipped_runs.py
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from changing.clipped import CLIPS, NETS, OPTIMIZERS, RATES, STEPS, Clipped, alerts, verdict
from harness.version import written_by

OUT = Path(__file__).parents[1] / "docs/benchmarks/clipping.md"
IN_HOSTS = (0.05, 1.0)  # clips that are tried in the other hosts too
MARGINS = ("stability_margin", "gradient_margin")
PAGE = """# Clipped runs

{written}
{steps} steps at a constant rate, judged by their losses alone: *healthy* runs have learnt more than
four fifths of what the best of all rates and clips learns, *failed* ones less than two thirds, at a
rate above the one that trains best with this clip. Alerts are those of a monitor with default
options that is told the norm before clipping; info is left out.

| optimizer | clip | healthy | margin alert | any alert | failed | margin alert | any alert |
|---|---|---|---|---|---|---|---|
{summary}

Healthy runs with an alert of a margin; a run counts once in each host. Nearly all are of SGD
without momentum, at a rate near or above the best: where the clip does not bind the margin is above
1 indeed, and the oscillation grows until it binds, and no further. How often a monitor looks
depends on the time that it may take, so that runs at the edge may come out otherwise elsewhere.

| net | optimizer | rate | clip | host | alerts |
|---|---|---|---|---|---|
{warned}

Failed runs of which nothing was warned. Their losses come and go: near zero at some steps, a half
at others.

| net | optimizer | rate | clip | host |
|---|---|---|---|---|
{silent}
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A run, what became of it, and what was warned of."""

    run: Clipped
    verdict: str
    alerts: Sequence[str]

    @property
    def of_margin(self) -> bool:
        """Whether a margin was warned of."""
        return any(alert.startswith(MARGINS) for alert in self.alerts)


def main() -> None:
    """Run all, and write the page."""
    logging.disable()
    torch.set_num_threads(1)
    rows = []
    for run in runs():
        rows.append(Row(run, verdict(run), alerts(run)))
        print(rows[-1], flush=True)
    OUT.write_text(page(rows), encoding="utf-8")


def runs() -> Iterator[Clipped]:
    """Yield the runs that are healthy or have failed."""
    for net, optimizer, clip in itertools.product(NETS, OPTIMIZERS, CLIPS):
        for rate in RATES[optimizer]:
            run = Clipped(net, optimizer, rate, clip)
            if verdict(run) == "neither":
                continue
            yield run
            if net == "tanh" and clip in IN_HOSTS and verdict(run) == "healthy":
                yield replace(run, host="Lightning")
                yield replace(run, host="Transformers")


def page(rows: Sequence[Row]) -> str:
    """Return the page."""
    warned = [row for row in rows if row.verdict == "healthy" and row.of_margin]
    silent = [row for row in rows if row.verdict == "failed" and not row.alerts]
    return PAGE.format(
        written=written_by(Path(__file__).name),
        steps=STEPS,
        summary="\n".join(_summary(rows)),
        warned="\n".join(map(_warned, warned)),
        silent="\n".join(map(_named, silent)),
    )


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    for optimizer, is_clipped in itertools.product(OPTIMIZERS, (True, False)):
        own = [r for r in rows if r.run.optimizer == optimizer]
        own = [r for r in own if (r.run.clip is not None) == is_clipped]
        counts = []
        for kind in ("healthy", "failed"):
            of_kind = [r for r in own if r.verdict == kind]
            counts += [len(of_kind), sum(r.of_margin for r in of_kind)]
            counts.append(sum(bool(r.alerts) for r in of_kind))
        clip = "0.05 to 1" if is_clipped else "none"
        yield f"| {optimizer} | {clip} | {' | '.join(map(str, counts))} |"


def _warned(row: Row) -> str:
    return f"{_named(row)} {', '.join(row.alerts)} |"


def _named(row: Row) -> str:
    run = row.run
    clip = "none" if run.clip is None else f"{run.clip:g}"
    return f"| {run.net} | {run.optimizer} | {run.rate:g} | {clip} | {run.host} |"


if __name__ == "__main__":
    main()
