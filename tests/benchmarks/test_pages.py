"""The pages that benchmarks write: which version each is of, and which program wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness.version import ROOT, commit

PAGES = sorted(p for p in (ROOT / "docs/benchmarks").glob("*.md") if p.name != "README.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_its_program_and_its_commit(page: Path):
    said = " ".join(page.read_text(encoding="utf-8").splitlines()[:8])
    found = re.search(r"Written by `(benchmarks/\w+\.py)` .*?at commit ([0-9a-f]{7})", said)
    assert found, said
    assert (ROOT / found[1]).exists() != ("has since been removed" in said)


def test_every_page_is_in_the_list():
    listed = (ROOT / "docs/benchmarks/README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.md)\)", listed)) == {page.name for page in PAGES}


def test_a_page_is_written_at_the_commit_that_is_checked_out():
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", commit())
