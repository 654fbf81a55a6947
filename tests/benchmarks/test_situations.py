"""Every situation comes out right, and the page lists them all."""

from __future__ import annotations

import warnings

import pytest
from every_situation import OUT, page
from situations.table import KINDS, Found, Situation, everything

ALL = everything()


@pytest.mark.parametrize("case", ALL, ids=[f"{s.kind}: {s.name}" for s in ALL])
def test_a_situation_comes_out_right(case: Situation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about layouts that are in beta
        found = case.run()
    assert found.right, f"{found.said}; {found.reference}"


def test_each_kind_has_situations_of_different_names():
    assert {s.kind for s in ALL} == set(KINDS)
    assert len({(s.kind, s.name) for s in ALL}) == len(ALL) > 60


def test_the_page_lists_every_situation():
    written = OUT.read_text(encoding="utf-8")
    assert not [s.name for s in ALL if s.name.replace("|", "\\|") not in written]
    assert "**wrong**" not in written


def test_what_is_wrong_is_seen_in_the_page():
    case = Situation("items", "a | b", lambda: Found("", "", right=False))
    assert "| a \\| b | 1 | 2 | **wrong** |" in page([(case, Found("1", "2", right=False))])
