"""The command `geomwatch`: explains what a rule has said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from geomwatch.errors import UsageError
from geomwatch.records import VERSION
from geomwatch.rules.explain import explain, explained

_ABOUT = (
    "Watches the loss geometry of PyTorch trainings. The command explains what a rule has said."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status, 2 for wrong use."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.command is None:
        parser.print_help()
        return 0
    try:
        return _explain(chosen.rule)
    except UsageError as error:
        print(f"geomwatch explain: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `geomwatch explain ... | head`
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="geomwatch", description=_ABOUT)
    parser.add_argument("--version", action="version", version=VERSION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    about = "what a rule means, where its levels come from, what to do; without RULE lists them"
    command = commands.add_parser("explain", help=about, description=about)
    command.add_argument("rule", nargs="?", metavar="RULE", help="as an alert names it")
    return parser


def _explain(rule: str | None) -> int:
    if rule is not None:
        print(explain(rule).rstrip())
        return 0
    rules = explained()
    width = max(map(len, rules))
    for name, summary in rules.items():
        print(f"{name:<{width}}  {summary}")
    print("\ngeomwatch explain RULE tells more.")
    return 0
