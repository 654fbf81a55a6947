"""What people pass for sinks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geomwatch.errors import UsageTypeError
from geomwatch.sinks.json_lines import JsonLines
from geomwatch.sinks.lines import Sink


def as_sinks(given: Sequence[Sink | str | Path] | Sink | str | Path) -> tuple[Sink, ...]:
    """Return sinks: a path is a JsonLines file, one sink or path will do.

    Raises:
        UsageTypeError: something is neither callable nor a path.
    """
    several = given if isinstance(given, list | tuple) else (given,)
    for sink in several:
        if isinstance(sink, type) or not (callable(sink) or isinstance(sink, str | Path)):
            ours = sink is JsonLines or not isinstance(sink, type)
            shown = '"run.jsonl"' if ours else f"{sink.__name__}()"
            raise UsageTypeError(
                f"sinks must be callables that take a line, or paths of files, got {sink!r}.",
                write=f"sinks={shown}",
            )
    return tuple(JsonLines(s) if isinstance(s, str | Path) else s for s in several)
