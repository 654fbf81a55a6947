"""The tables of the report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from studies.cases import Case
from studies.figures import comparisons, label
from studies.inference import Interval, number, ratio
from studies.paper import NUMBERS, QUANTITIES
from studies.ranking import NAMES, SIGNATURES, TARGETS, Found
from studies.settings import STAGES
from studies.table import Table

_PARTS = (
    ("lambda_max", "λ_max"),
    ("trace", "tr(H)"),
    ("trace_per_param", "tr(H)/D"),
    ("ggn_effective_rank", "r_eff (GN)"),
    ("normalized_sharpness", "NS"),
    ("train_filter_worst", "worst R"),
    ("barrier_height", "barrier"),
    ("steps_to_target", "steps"),
    ("test_loss", "test loss"),
)


def numbers(table: Table) -> str:
    """Every quantity of the paper's nets at the three stages, beside what it prints."""
    lines = [
        "## The numbers, beside the paper's",
        "",
        "Mean ± standard error over seeds (of barriers over pairs of seeds), in train mode unless "
        "it says otherwise. The paper gives one number for each, without saying at which step; its "
        "Transformer reads a tiny data set.",
        "",
        "![The quantities at the start, after a tenth, and at the end, with standard errors]"
        "(over_time.png)",
    ]
    for case in table.plain:
        lines += ["", f"### {label(case)}: {_described(table, case)}", ""]
        lines += _rows(
            ("", "paper", "start", "10 %", "end"),
            (
                (title, _printed(case, q), *(_cell(table, case, q, stage) for stage in STAGES))
                for q, title in QUANTITIES.items()
            ),
        )
    return "\n".join(lines)


def _described(table: Table, case: Case) -> str:
    size = table.mean(case, "parameters").mean or 0
    accuracy = table.mean(case, "test_accuracy")
    steps = table.mean(case, "steps_to_target")
    return f"{size:,.0f} parameters, test accuracy {accuracy}, {steps} steps to the target"


def _printed(case: Case, quantity: str) -> str:
    return NUMBERS.get((case.architecture, quantity), "")


def _cell(table: Table, case: Case, quantity: str, stage: str) -> str:
    entries = table.entries(case, quantity, stage)
    if not entries:
        return ""
    known, of = len(table.mean(case, quantity, stage).values), len(entries)
    text = str(table.mean(case, quantity, stage))
    return text if known == of else f"{text} ({known} of {of})"


def artefacts(table: Table) -> str:
    """What power iteration without deflation finds, and what a loss that changes looks like."""
    lines = [
        "## Two ways to be deceived",
        "",
        "![Eigenvalues without deflation, and slices of a loss that changes](artefacts.png)",
        "",
        "Power iteration from several starts, without and with deflation, beside Lanczos "
        "(residuals in brackets), at the end of the first seed:",
        "",
    ]
    rows = []
    for case in table.plain:
        power = table.artefact(case, "power")
        exact = zip(power["lanczos"], power["residuals"], strict=True)
        rows.append(
            (
                label(case),
                _listed(power["without_deflation"]),
                _listed(power["with_deflation"]),
                ", ".join(f"{number(v)} ({r:.0e})" for v, r in exact),
                f"{power['hvps']['power']} / {power['hvps']['power']} / {power['hvps']['lanczos']}",
            )
        )
    lines += _rows(("", "no deflation", "deflated", "Lanczos", "HVPs"), rows)
    lines += [
        "",
        "Slices along the same directions, with a loss that is steady and with one that changes: "
        "rest beside a quartic over the range, changes of slope, and whether geomwatch has called "
        "the loss deterministic:",
        "",
    ]
    header = ("", "way", "unit v: rest", "turns", "filter-normalised v: rest", "turns", "steady")
    lines += _rows(header, (row for case in table.plain for row in _rugged(table, case)))
    return "\n".join(lines)


def _rugged(table: Table, case: Case) -> Iterable[Sequence[str]]:
    found = table.artefact(case, "rugged")
    words = {
        "off": "eval mode",
        "replayed": "train mode, one mask",
        "redrawn": "train mode, masks drawn anew",
        "batches": "another batch at each point",
    }
    for way, word in words.items():
        if f"{way}_unit" not in found:
            continue
        unit, scaled = found[f"{way}_unit"], found[f"{way}_filter"]
        cells = (unit["rest"], unit["turns"], scaled["rest"], scaled["turns"])
        steady = "yes" if unit["deterministic"] and scaled["deterministic"] else "no"
        yield (label(case), word, *(_plain(c) for c in cells), steady)


def parts(table: Table) -> str:
    """What skip connections, normalisation and width change."""
    lines = [
        "## What the parts of a net do",
        "",
        "![Ratios with and without parts](parts.png)",
        "",
        "Ratios at the end of training, with 95 % intervals over seeds (bars and brackets): with "
        "skip connections to without, with normalisation to without, the net as it is to one of a "
        "quarter of its width.",
        "",
    ]
    rows = ((f"{name}, {part}", *_ratios(table, a, b)) for part, name, a, b in comparisons(table))
    lines += _rows(("", *(title for _, title in _PARTS)), rows)
    return "\n".join(lines)


def _ratios(table: Table, a: Case, b: Case) -> Iterable[str]:
    for quantity, _ in _PARTS:
        yield _interval(ratio(table.mean(a, quantity), table.mean(b, quantity)))


def ranks(
    found: Mapping[tuple[str, str], Found], elsewhere: Mapping[tuple[str, str], Found]
) -> str:
    """What goes along with how runs end."""
    runs = max(one.runs for one in found.values())
    lines = [
        "## What goes along with trainability, separability and generalization",
        "",
        "![Rank correlations](ranks.png)",
        "",
        "Spearman's ρ of each quantity at 10 % of the training with what a run ends in, over up "
        f"to {runs} runs (all nets and variants on images), with 95 % intervals of a bootstrap "
        "over configurations; in the second of each pair of columns ranks are taken within an "
        "architecture. Signatures are predictions by ridge regression on ranks, each configuration "
        "left out of its own. Many intervals are looked at here: one in twenty misses 0 by chance.",
        "",
    ]
    titles = [f"{t}, {kind}" for t in TARGETS.values() for kind in ("all", "within")]
    keys = [*NAMES, *SIGNATURES]
    rows = (
        (NAMES.get(key, key), *(_interval(i) for t in TARGETS for i in _pair(found[key, t])))
        for key in keys
    )
    lines += _rows(("at 10 %", *titles), rows)
    lines += ["", "The same signatures, each architecture predicted from the other two:", ""]
    rows = (
        (key, *(_interval(i) for t in TARGETS for i in _pair(elsewhere[key, t])))
        for key in SIGNATURES
    )
    lines += _rows(("at 10 %", *titles), rows)
    return "\n".join(lines)


def _pair(found: Found) -> tuple[Interval | None, Interval | None]:
    return found.pooled, found.within


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    kept = [row for row in rows if any(row[1:])]
    lines = [header, ["---"] * len(header), *kept]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _listed(values: Iterable[float]) -> str:
    return ", ".join(number(v, 4) for v in values)


def _plain(value: float | None) -> str:
    return "-" if value is None else number(value, 2)


def _interval(found: Interval | None) -> str:
    return "-" if found is None else str(found)
