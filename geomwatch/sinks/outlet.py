"""One sink of a run: called with each line, survived, and what it loses counted."""

from __future__ import annotations

import contextlib

from geomwatch.sinks.lines import Line, Sink
from geomwatch.sinks.log import logger


class Outlet:
    """A sink that raises nothing: a full disk or a bug in it must not stop a training run."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.lost = 0  # lines that it has raised at

    def __call__(self, line: Line) -> None:
        """Send one line; a line that ends a run tells how many were lost on the way."""
        if line["kind"] == "end":
            line = {**line, "lost": self.lost}
        try:
            self._sink(line)
        except Exception as error:  # of the user's own code, say
            self.lost += 1
            if self.lost == 1:
                _warn(
                    f"{self._sink!r} failed with {type(error).__name__}: {error}. Training goes "
                    "on, and it is called again with the next line; this is said once.",
                    error,
                )

    def close(self) -> None:
        """Close the sink, if it can be closed, and say what it has lost."""
        try:
            getattr(self._sink, "close", lambda: None)()
        except Exception as error:  # of the user's own sink: the run has ended well
            _warn(f"{self._sink!r} could not be closed: {type(error).__name__}: {error}", error)
        if self.lost:
            _warn(f"{self._sink!r} has lost {self.lost} lines of this run.")


def _warn(message: str, error: Exception | None = None) -> None:
    with contextlib.suppress(Exception):  # of a handler: it is the log itself that is broken
        logger.warning("%s", message, exc_info=error)
