"""Write the tables of levels into the pages, from the fields that declare them.

A page says `<!-- fields of geomwatch.controllers.LearningRateCap -->` where it wants one, or
`<!-- fields of all.rules -->` for the index of the rules, and `<!-- end of fields -->` where it
ends. `python tools/write_fields.py` brings all pages up to date.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from geomwatch.observation.documented import table_of
from geomwatch.rules import DEFAULT
from geomwatch.rules.explain import explained

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- fields of (\S+) -->\n).*?(<!-- end of fields -->)", flags=re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that may hold such tables."""
    return sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("geomwatch/rules/pages/*.md")])


def written(page: Path) -> str:
    """Return a page with its tables as the fields are now."""

    def fill(place: re.Match[str]) -> str:
        module, _, name = place[2].rpartition(".")
        if module == "all":
            return f"{place[1]}\n{index()}\n\n{place[3]}"
        table = table_of(getattr(importlib.import_module(module), name))
        return f"{place[1]}\n{_linked(table, page)}\n\n{place[3]}"

    return PLACE.sub(fill, page.read_text(encoding="utf-8"))


def index() -> str:
    """Return a table of the rules: what each watches, how loud it is, and when it is asked."""
    asked = {
        "step": "every step",
        "rise": "a look, a probe, a rate that rises",
        "norm": "a known norm, a look, a probe",
        "look": "a look, a probe",
        "taken": "a step whose loss was looked at again",
        "probe": "a probe",
    }
    rows = ["| rule | | severities | asked at |", "|---|---|---|---|"]
    for kind in DEFAULT:
        page = f"[{kind.name}](../geomwatch/rules/pages/{kind.name}.md)"
        says = ", ".join(kind.says)
        read = kind.reads
        when = asked[read] if isinstance(read, str) else f"a probe with {' and '.join(read)}"
        rows.append(f"| {page} | {explained()[kind.name]} | {says} | {when} |")
    return "\n".join(rows)


def _linked(table: str, page: Path) -> str:
    """Link the decisions that a table names."""

    def link(number: re.Match[str]) -> str:
        (file,) = (ROOT / "docs" / "decisions").glob(f"{number[0]}-*.md")
        return f"[{number[0]}]({Path(os.path.relpath(file, page.parent)).as_posix()})"

    return re.sub(r"(?<=[ (])0\d\d(?=[ ,:;)])", link, table)


if __name__ == "__main__":
    for page in pages():
        page.write_text(written(page), encoding="utf-8")
