"""The report: figures, numbers as JSON and CSV, the log, and a page that holds them together."""

from __future__ import annotations

import csv
import json
import platform
import shutil
from pathlib import Path

import torch

from studies import figures, pages
from studies.claims import judged
from studies.ranking import NAMES, SIGNATURES, TARGETS, Found, Runs, correlate, predict, runs_of
from studies.running import LOG, spent
from studies.settings import Settings
from studies.store import Store, plain
from studies.table import Table
from studies.verdicts import Claim

Correlations = dict[tuple[str, str], Found]


def write(store: Store, settings: Settings, out: Path) -> None:
    """Write the report of a finished study into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    table = Table(store, settings)
    runs = runs_of(table)
    claims = judged(table, runs)
    found = correlations(runs, settings.bootstrap)
    elsewhere = by_architecture(runs, settings.bootstrap)
    figures.write(
        {
            "landscapes": figures.landscapes(store, table, settings),
            "over_time": figures.over_time(table),
            "artefacts": figures.artefacts(table),
        },
        out,
    )
    if table.variants:
        figures.write({"parts": figures.parts(table), "ranks": figures.ranks(found)}, out)
    _write_numbers(table, out)
    _write_conclusions(claims, found, out)
    shutil.copyfile(store.folder / LOG, out / LOG)
    wall, processor = spent(store)
    machine = f"one thread, torch {torch.__version__}, {platform.machine()}"
    clock = f"{wall / 60:.0f} by the clock, beside other work"
    costs = f"{processor / 60:.0f} minutes of CPU time ({clock}; {machine})"
    text = pages.page(table, claims, found, elsewhere, costs)
    (out / "README.md").write_text(text, encoding="utf-8")


def correlations(runs: Runs, resamples: int) -> Correlations:
    """Correlate every early quantity, and the joint signatures, with every target."""
    found: Correlations = {}
    for target in TARGETS:
        for name in NAMES:
            found[name, target] = correlate(runs, name, target, stage="early", resamples=resamples)
        for name, signature in SIGNATURES.items():
            found[name, target] = predict(
                runs, signature, target, by="configuration", resamples=resamples
            )
    return found


def by_architecture(runs: Runs, resamples: int) -> Correlations:
    """Predict the targets of each architecture from the other two."""
    return {
        (name, target): predict(runs, signature, target, by="architecture", resamples=resamples)
        for name, signature in SIGNATURES.items()
        for target in TARGETS
    }


def _write_numbers(table: Table, out: Path) -> None:
    """Every number of every run as CSV; as JSON why some are missing."""
    rows = [
        {
            "net": e.case.architecture,
            "data": e.case.kind,
            "variant": e.case.variant,
            "seed": e.seed,
            "stage": e.stage,
            "quantity": e.quantity,
            "value": e.value,
            "error": e.error,
            "reason": e.reason,
        }
        for e in table
    ]
    with (out / "numbers.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(
            file, list(rows[0])[:-1], extrasaction="ignore", lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)
    missing = [{k: v for k, v in row.items() if k != "error"} for row in rows if row["reason"]]
    _write_json(missing, out / "missing.json")


def _write_conclusions(claims: list[Claim], found: Correlations, out: Path) -> None:
    listed = [
        {
            "section": c.section,
            "claim": c.sentence,
            "criterion": c.criterion,
            "verdict": c.verdict,
            "conditions": [{"verdict": x.verdict, "evidence": x.evidence} for x in c.conditions],
        }
        for c in claims
    ]
    ranked = [
        {
            "quantity": name,
            "target": target,
            "runs": one.runs,
            **{
                kind: None if i is None else {"rho": i.value, "low": i.low, "high": i.high}
                for kind, i in (("all", one.pooled), ("within", one.within))
            },
        }
        for (name, target), one in found.items()
    ]
    _write_json({"claims": listed, "correlations": ranked}, out / "conclusions.json")


def _write_json(value: object, path: Path) -> None:
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
