"""The page of the report, in Markdown: every sentence with a number in it is made from numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from studies import tables
from studies.figures import label
from studies.ranking import Found
from studies.table import Table
from studies.verdicts import FAILS, HOLDS, OPEN, Claim


def page(
    table: Table,
    claims: Sequence[Claim],
    found: Mapping[tuple[str, str], Found],
    elsewhere: Mapping[tuple[str, str], Found],
    costs: str,
) -> str:
    """Return the whole page."""
    sections = [
        _head(table, claims, costs),
        _verdicts(claims),
        tables.numbers(table),
        tables.artefacts(table),
        tables.parts(table) if table.variants else "",
        tables.ranks(found, elsewhere) if table.variants else "",
        _method(table),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(table: Table, claims: Sequence[Claim], costs: str) -> str:
    count = Counter(claim.verdict for claim in claims)
    seeds = len(table.settings.seeds)
    return f"""# Three architectures, with error bars

The study of the paper that geomwatch grows from ("Loss Landscape Geometry & Optimization Dynamics
in Deep Neural Architectures", M. Venkatasubramanian, 2025), done again: {seeds} seeds, one set of
images for all three nets, every number with its error, every claim held to a criterion that stands
beside it. Of {len(claims)} claims {count[HOLDS]} hold, {count[FAILS]} fail, and {count[OPEN]} stay
undecided.

Written by `examples/three_architectures.py`, verdicts included, in {costs}.
Every number is in [numbers.csv](numbers.csv), the conclusions are in
[conclusions.json](conclusions.json), why a number could not be had in [missing.json](missing.json);
[log.txt](log.txt) is what each piece has cost.

![Slice, plane, barrier and spectrum of each net](landscapes.png)

*The first seed of each net at the end of its training: a slice along a filter-normalised direction
with its parabola and what that leaves, the plane of two such directions, the path to the second
seed (straight, and with units aligned), the spectral density of the Hessian.*"""


def _verdicts(claims: Sequence[Claim]) -> str:
    lines = [
        "## The paper's claims",
        "",
        "Ratios are of geometric means over seeds, with Welch's 95 % interval; a condition holds "
        "or fails if its whole interval says so. One condition that fails makes a claim fail. With "
        f"{len(claims)} claims one or two verdicts may be chance. What is in parentheses is ours. "
        "SGD as a sampler has [a page of its own](../../benchmarks/sgd_sampler.md).",
    ]
    for verdict, title in ((HOLDS, "What holds"), (FAILS, "What fails"), (OPEN, "Undecided")):
        own = [claim for claim in claims if claim.verdict == verdict]
        lines += ["", f"### {title}", ""]
        lines += [
            f"- **{verdict}** ({claim.section}) {claim.sentence}. {claim.evidence}. "
            f"*Criterion: {claim.criterion}.*"
            for claim in own
        ] or ["Nothing."]
    return "\n".join(lines)


def _method(table: Table) -> str:
    s = table.settings
    rates = ", ".join(f"{label(c)} {c.lr:g}" for c in table.plain)
    sets = "; ".join(
        f"{d.name}, {len(d.train[1])} to train on and {len(d.held_out[1])} held out"
        for d in dict.fromkeys(c.data(s) for c in table.plain)
    )
    return f"""## How it was done

- **Data.** {sets}. Images are real; verses are classified into Old and New Testament from 32 words.
- **Nets.** An MLP with two hidden layers of {s.widths[0]}; a ResNet-18 of torchvision's shape that
  begins with {s.widths[1]} channels instead of 64; a pre-norm Transformer encoder of 2 layers,
  width {s.widths[2]}, 4 heads, dropout 0.1, that reads images row by row.
- **Training.** {s.steps} steps at batch {s.batch}, constant rates: {rates} (SGD with momentum 0.9,
  for the Transformer AdamW). "10 %" is step {s.early}. The target is a training loss of 0.5,
  averaged over ten steps; a run that does not reach it counts as later than all that do.
- **Geometry.** On the first {s.items} training items, in train mode: BatchNorm on the statistics of
  the batch, dropout one mask that is replayed. Eigenvalues by Lanczos with {s.lanczos} HVPs, traces
  by Hutchinson with {s.samples} ({s.fewer:.0%} of both for variants), NS by ascent in the paper's
  ball, R over alpha in [-1, 1] at {s.points} points and {s.directions} directions. "rest" is the
  r.m.s. rest of a quartic over the range of a slice.
- **r_eff** is withheld where the Hessian is indefinite: tr(H)²/tr(H²) has no meaning there. That of
  the Gauss-Newton matrix always has one.
- **Barriers.** Between seeds in a ring, at {s.points} points, in eval mode, BatchNorm's statistics
  taken anew at each. B = max L contains the loss of the ends; the height is what the path rises
  above the line between them. Of the Transformer only the units of its linear layers are aligned.
  Two pairs share a seed, so the errors of their means are somewhat too small.
- **Difficulty** is the paper's sum of lr |g|² λ_max over the steps, by `geomwatch.Monitor`, with
  the λ_max of training batches at every tenth of the run.
- **Ours, not the paper's**, which states none of them: sizes, data, rates, radii, grids, stages."""
