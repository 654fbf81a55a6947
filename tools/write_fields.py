"""Write the tables of levels into the pages, from the fields that declare them.

A page says `<!-- fields of geomwatch.controllers.LearningRateCap -->` where it wants one, and
`<!-- end of fields -->` where it ends. `python tools/write_fields.py` brings all pages up to date.
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

from geomwatch.observation.documented import table_of

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"(<!-- fields of (\S+) -->\n).*?(<!-- end of fields -->)", flags=re.DOTALL)


def pages() -> list[Path]:
    """Return the pages that may hold such tables."""
    return sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("geomwatch/rules/pages/*.md")])


def written(page: Path) -> str:
    """Return a page with its tables as the fields are now."""

    def fill(place: re.Match[str]) -> str:
        module, _, name = place[2].rpartition(".")
        table = table_of(getattr(importlib.import_module(module), name))
        return f"{place[1]}\n{_linked(table, page)}\n\n{place[3]}"

    return PLACE.sub(fill, page.read_text(encoding="utf-8"))


def _linked(table: str, page: Path) -> str:
    """Link the decisions that a table names."""

    def link(number: re.Match[str]) -> str:
        (file,) = (ROOT / "docs" / "decisions").glob(f"{number[0]}-*.md")
        return f"[{number[0]}]({Path(os.path.relpath(file, page.parent)).as_posix()})"

    return re.sub(r"(?<=[ (])0\d\d(?=[ ,:;)])", link, table)


if __name__ == "__main__":
    for page in pages():
        page.write_text(written(page), encoding="utf-8")
