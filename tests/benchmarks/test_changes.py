"""Runs that change on the way are measured as they are, and the page lists them all."""

from __future__ import annotations

import pytest
from changing.table import Verdict, cases, judge
from every_change import OUT, page

ALL = cases()
FEW = (
    "an adapter, all else frozen, raw, momentum",
    "a new optimizer, Lightning, AdamW, clip 0.05",
    "weights loaded by assignment, Lightning, momentum",
    "an optimizer of another kind, Transformers, AdamW",
)


@pytest.mark.parametrize("case", [c for c in ALL if c.name in FEW], ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore")  # of hosts about small runs
def test_a_run_that_changes_comes_out_right(case):
    assert judge(case).wrong == []


def test_the_page_lists_every_case_and_all_are_right():
    written = OUT.read_text(encoding="utf-8")
    assert len(FEW) == sum(case.name in FEW for case in ALL)
    assert len({case.name for case in ALL}) == len(ALL) >= 50
    assert sum(line.count("| same | right |") for line in written.splitlines()) == len(ALL)
    assert all(f"| {case.change} | {case.host} |" in written for case in ALL)


def test_what_is_wrong_is_seen_in_the_page():
    verdict = Verdict(ALL[0], 3, "1 (2)", "1 (1)", False, ["step 3: lambda_max 1, right is 2"])
    assert "| 1 (2) | 1 (1) | **other** | **wrong** |" in page([verdict])
