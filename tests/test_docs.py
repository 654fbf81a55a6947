"""Documents keep their form, and name what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = r"(?<![\w/.(])(?:docs|geomwatch|benchmarks|tests|tools|integrations)/[\w./-]*\.(?:md|py)\b"
REMOVED = (
    "script that has\nbeen removed",
    "script that has been removed",
    "which has since been removed",
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem[:3])
def test_a_decision_fits_on_a_screen_and_says_whether_it_holds(path):
    title, empty, status, *rest = path.read_text(encoding="utf-8").splitlines()
    assert title.startswith(f"# {path.stem[:3]}: ")
    assert not empty
    assert re.fullmatch(r"Status: (holds|superseded by \d{3})", status)
    assert len(rest) + 3 <= 30
    assert any(line.startswith("**Context.**") for line in rest)
    assert any(line.startswith("**Choice") for line in rest)


def test_decisions_are_numbered_in_a_row():
    assert [int(path.stem[:3]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_to_files_that_exist(path):
    links = re.findall(r"\]\((?!https?://)([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_files_that_a_page_names_exist(path):
    text = path.read_text(encoding="utf-8")
    gone = re.findall(rf"`({PATH})` at commit \w+, which has since been removed", text)
    assert not [
        name for name in re.findall(PATH, text) if name not in gone and not (ROOT / name).is_file()
    ]
