"""Where records and alerts go, and back: a sink is any callable that takes a line, a flat dict.

May import parallel, records and errors. A newcomer would change something here to write lines
elsewhere, or to say another fact: `lines` makes them, `reading` reads them back from a file.
"""

from geomwatch.sinks.given import as_sinks
from geomwatch.sinks.json_lines import JsonLines
from geomwatch.sinks.lines import (
    Line,
    Sink,
    adjustment_line,
    alert_line,
    end_line,
    look_line,
    record_line,
    run_line,
)
from geomwatch.sinks.log import Log, logger
from geomwatch.sinks.reading import Lost, Run, read
from geomwatch.sinks.tracker import Tracker

__all__ = [
    "JsonLines",
    "Line",
    "Log",
    "Lost",
    "Run",
    "Sink",
    "Tracker",
    "adjustment_line",
    "alert_line",
    "as_sinks",
    "end_line",
    "logger",
    "look_line",
    "read",
    "record_line",
    "run_line",
]
