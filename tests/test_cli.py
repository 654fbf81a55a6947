"""The command `geomwatch explain`, and the pages behind it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from observations import heard, random_run

import geomwatch
from geomwatch.cli import main
from geomwatch.errors import UsageError
from geomwatch.rules import default_rules
from geomwatch.rules.explain import explain, explained

ROOT = Path(__file__).parents[1]
HEADINGS = ["When it speaks", "Where the levels come from", "What to do", "Change it"]


def test_without_a_rule_all_are_listed(capsys):
    assert main(["explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "  " in line] == list(explained())
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("rule", explained())
def test_the_page_of_a_rule_is_printed(rule, capsys):
    assert main(["explain", rule, "--why"]) == 0
    assert capsys.readouterr().out == explain(rule).rstrip() + "\n"
    assert main(["explain", rule]) == 0
    first, second, third = re.findall("^#+ .*|^geomwatch .*", capsys.readouterr().out, re.M)
    assert (first, second) == (f"# {rule}", "## What to do")
    assert third.startswith(f"geomwatch explain {rule} --why")


def test_an_unknown_rule_is_an_error_with_a_hint(capsys):
    assert main(["explain", "stability-margn"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "rule must be one of bad_batch, " in printed.err
    assert "Did you mean 'stability_margin'?" in printed.err


@pytest.mark.parametrize("rule", ["../margin", "explain", "", "stability_margin.md", "a/b"])
def test_what_is_no_name_of_a_rule_is_refused(rule):
    with pytest.raises(UsageError, match=r"rule must be one of .*, got "):
        explain(rule)


def test_no_command_prints_help(capsys):
    assert main([]) == 0
    assert "explain" in capsys.readouterr().out


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["explane"])
    assert "explane" in capsys.readouterr().err


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.strip() == geomwatch.__version__


def test_the_package_runs_as_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "geomwatch", "explain", "nothing"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "got 'nothing'" in run.stderr


def test_the_wheel_installs_the_command():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'geomwatch = "geomwatch.cli:main"' in text
    installed = entry_points(group="console_scripts", name="geomwatch")
    assert all(entry.load() is main for entry in installed)


def test_every_default_rule_has_a_page():
    names = {rule.name for rule in default_rules()}
    assert names <= set(explained())
    assert set(explained()) - names <= {"flat_but_isolated", "gradient_margin"}


@pytest.mark.parametrize("rule", explained())
def test_a_page_has_what_every_page_has(rule):
    page = explain(rule)
    assert page.startswith(f"# {rule}\n\n")
    found = re.findall(r"^## (.*)", page, flags=re.MULTILINE)
    assert [h for h in HEADINGS if h in found] == HEADINGS
    assert max(map(len, page.splitlines())) <= 160  # tables; text is within 100


def test_a_page_names_files_that_exist():
    for rule in explained():
        for path in re.findall(r"(?:docs|geomwatch|benchmarks)/[\w./-]*\.(?:md|py)", explain(rule)):
            assert (ROOT / path).is_file(), f"{rule}: {path}"


def test_the_index_links_every_page():
    index = (ROOT / "docs/rules.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\.\./geomwatch/rules/pages/(\w+)\.md", index))
    assert links == set(explained())


def test_every_message_ends_in_a_page_that_exists():
    alerts = [
        a for seed in range(30) for rule in default_rules() for a in heard(rule, random_run(seed))
    ]
    assert {a.rule for a in alerts} == {rule.name for rule in default_rules()}
    for alert in alerts:
        assert alert.message.endswith(f" More: geomwatch explain {alert.rule}."), alert
        assert explain(alert.rule)
