"""The command `geomwatch`: what became of a run, several side by side, what a rule has said."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from geomwatch.doctor import doctor
from geomwatch.errors import UsageError
from geomwatch.records import VERSION, gravest
from geomwatch.report.compare import as_text, write_comparison
from geomwatch.report.page import write_page
from geomwatch.report.sheet import write_sheet
from geomwatch.report.tail import follow, glance
from geomwatch.rules.explain import advice_of, explain, explained
from geomwatch.sinks.reading import Run, read

_ABOUT = "Watches the loss geometry of PyTorch trainings; these commands look at what it has seen."
_EXAMPLES = """examples:
  geomwatch report run.jsonl                      one page, run.html, that works offline
  geomwatch report run.jsonl --fail-on critical   for a CI job: exit status 1
  geomwatch compare first.jsonl second.jsonl      what differs, and curves in one another
  geomwatch tail run.jsonl                        while it trains
  geomwatch explain stability_margin              what to do about an alert
  geomwatch doctor train:watched                  what will be used for a model, and its cost

exit status: 0 fine, 1 what --fail-on asks for, 2 wrong use, 3 a file holds nothing readable"""
_FAILED, _WRONG, _EMPTY = 1, 2, 3
_ORDER = ("info", "warning", "critical")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    try:
        return int(_COMMANDS[chosen.command](chosen))
    except (UsageError, OSError) as error:
        print(f"geomwatch {chosen.command}: {error}", file=sys.stderr)
        return _WRONG
    except KeyboardInterrupt:  # of `tail`
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="geomwatch",
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, about: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=about, description=about)

    command = add("report", "one page of a run, that works offline, and a verdict")
    command.add_argument("run", metavar="RUN.jsonl", help="the file of sinks='run.jsonl'")
    command.add_argument("-o", "--out", help="the page; RUN.html by default")
    command.add_argument("--png", action="store_true", help="a picture beside it, by matplotlib")
    about = "exit status 1 from this severity on"
    command.add_argument("--fail-on", choices=_ORDER, help=about)
    command.add_argument("--monitor", help="of a Group's file, the lines of this monitor")
    command = add("compare", "runs side by side: a table, and a page of their curves")
    command.add_argument("runs", nargs="+", metavar="RUN.jsonl")
    command.add_argument("-o", "--out", default="compare.html", help="the page")
    command = add("tail", "a run while it goes on: loss, margin, rate, the last alert")
    command.add_argument("run", metavar="RUN.jsonl")
    command.add_argument("--once", action="store_true", help="as it stands, and end")
    command = add("explain", "what to do about an alert; without RULE lists them")
    command.add_argument("rule", nargs="?", metavar="RULE", help="as an alert names it")
    about = "when it speaks, and where its levels come from"
    command.add_argument("--why", action="store_true", help=about)
    command = add("doctor", "what will be used for a model, why, and at what cost")
    about = "a function that returns (model, loss_fn, batch) or (model, loss_fn, batch, optimizer)"
    command.add_argument("function", metavar="MODULE:FUNCTION", help=about)
    return parser


def _report(chosen: Any) -> int:
    run = _read(chosen.run, chosen.monitor)
    stem = Path(chosen.run)
    out = Path(chosen.out) if chosen.out else stem.with_suffix(".html")
    verdict = write_page(run, out, title=stem.name)
    print(verdict.sentence)
    print(f"page: {out}")
    if chosen.png:
        write_sheet(run, out.with_suffix(".png"), title=stem.name)
        print(f"picture: {out.with_suffix('.png')}")
    if _is_empty(run):
        return _EMPTY
    is_bad = chosen.fail_on and gravest([verdict.severity, chosen.fail_on]) == verdict.severity
    return _FAILED if is_bad else 0


def _compare(chosen: Any) -> int:
    runs = {_name(path, chosen.runs): _read(path) for path in chosen.runs}
    print(as_text(write_comparison(runs, chosen.out)))
    print(f"page: {chosen.out}")
    return _EMPTY if all(map(_is_empty, runs.values())) else 0


def _tail(chosen: Any) -> int:
    if not chosen.once:
        follow(chosen.run)
        return 0
    run = read(chosen.run)
    print(glance(run))
    return _EMPTY if _is_empty(run) else 0


def _explain(chosen: Any) -> int:
    if chosen.rule is not None:
        print(explain(chosen.rule).rstrip() if chosen.why else advice_of(chosen.rule))
        return 0
    rules = explained()
    width = max(map(len, rules))
    for name, summary in rules.items():
        print(f"{name:<{width}}  {summary}")
    print("\ngeomwatch explain RULE says what to do, --why where its levels come from.")
    return 0


def _doctor(chosen: Any) -> int:
    module, _, name = chosen.function.partition(":")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), name)()
        model, loss_fn, batch, *more = found
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{chosen.function!r} must name a function without arguments that returns (model, "
            f"loss_fn, batch): {type(error).__name__}: {error}.",
            write="geomwatch doctor train:watched",
        ) from error
    print(doctor(model, loss_fn, batch, optimizer=more[0] if more else None))
    return 0


def _read(path: str, monitor: str | None = None) -> Run:
    run = read(path, monitor=monitor)
    for lost in run.lost[:5]:
        print(f"{path}, line {lost.line}: {lost.reason}", file=sys.stderr)
    if len(run.lost) > 5:
        print(f"{path}: and {len(run.lost) - 5} more lines", file=sys.stderr)
    return run


def _is_empty(run: Run) -> bool:
    return not (run.runs or run.records or run.looks or run.alerts)


def _name(path: str, paths: Sequence[str]) -> str:
    """Return the shortest name that no other file of these has."""
    stem = Path(path).stem
    return path if sum(Path(other).stem == stem for other in paths) > 1 else stem


_COMMANDS: Mapping[str, Callable[[Any], int]] = {
    "report": _report,
    "compare": _compare,
    "tail": _tail,
    "explain": _explain,
    "doctor": _doctor,
}
